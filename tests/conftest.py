"""The environment of all tests: eight CPU devices, no network, no programs of an earlier run."""

import gc
import importlib.metadata
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Set before jax starts, and in the environment so that the processes that tests start have it too.
os.environ.setdefault("NPROC", "16")  # XLA's threads: with as few as two, collectives deadlock
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs of an earlier run must not decide: subprocesses cache none, and the workers of this run
# share a folder that ends with it. (`.ci/run` names one folder for its two runs on Python 3.11.)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
if "L4JAX_TEST_PROGRAMS" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="l4jax-programs-")
    os.environ["L4JAX_TEST_PROGRAMS"] = PROGRAMS.name

DEVICES = 8
MOST_WORKERS = 8  # each takes up to 3 GiB
GPU_WORKERS = 4  # on one GPU: each spends most of its time in one thread that compiles
MAPPINGS = 20_000  # of compiled programs; a process crashes beyond 65,530
ORACLES = ("compressed_tensors", "peft", "torch", "transformers")
MISSING = [name for name in ORACLES if importlib.util.find_spec(name) is None]

# Python 3.11 has them all or no torch: what else is missing there is an error, and no choice.
IS_LEFT_OUT = "torch" in MISSING or (bool(MISSING) and sys.version_info >= (3, 12))
collect_ignore = ["reference"] if IS_LEFT_OUT else []


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute the whole suite over the cores, and GPU tests over four processes.

    Tests of files that are named run in one process, unless `-n` says in how many.
    """
    option = config.option
    is_open = getattr(option, "numprocesses", 0) is None  # of xdist, which may be missing
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_open and not (is_worker or option.collectonly or option.usepdb):
        if _wants_gpu(config):
            option.numprocesses = GPU_WORKERS
        elif config.args_source is not pytest.Config.ArgsSource.ARGS:
            option.numprocesses = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    if getattr(option, "numprocesses", 0) and option.dist == "no":
        option.dist = "worksteal"  # keeps tests of a module together, with its fixtures


def pytest_configure(config: pytest.Config) -> None:
    if not _wants_gpu(config):
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Nearly all the time goes into compiling programs that run for a millisecond.
        flags = ["--xla_backend_optimization_level=0"]
        version = importlib.metadata.version("jaxlib").split(".")
        if tuple(map(int, version[:2])) < (0, 11):  # newer ones have no such choice
            flags.append("--xla_cpu_use_fusion_emitters=false")  # a quarter less in the compiler
        os.environ.setdefault("XLA_FLAGS", " ".join(flags))
    else:
        # There it goes into trying products on the device, for programs that run once.
        os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several share the device

    import jax

    if not _wants_gpu(config):
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # (On a GPU the engine would keep its own beside them.)
    jax.config.update("jax_enable_compilation_cache", not _wants_gpu(config))
    jax.config.update("jax_compilation_cache_dir", os.environ["L4JAX_TEST_PROGRAMS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def _drop_programs() -> Iterator[None]:
    """Drop compiled programs before their mappings of memory reach the limit of a process."""
    yield
    with open("/proc/self/maps") as maps:
        mappings = sum(1 for _ in maps)
    if mappings > MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def hang_guard() -> Iterator[None]:
    """Fail a test that has not ended after a minute, a hundred times as long as it takes."""

    def fail(*_: object) -> None:
        raise TimeoutError("not done after a minute: its time grows faster than its input")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pytest_report_header(config: pytest.Config) -> list[str]:
    import jax

    lines = [f"jax {jax.__version__}, {DEVICES} CPU devices"]
    if _wants_gpu(config) and not _has_gpu():
        lines.append("gpu tests: deselected, jax finds no GPU")
    if IS_LEFT_OUT:
        lines.append(f"tests/reference: left out, no {', '.join(MISSING)} (the goldens remain)")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _wants_gpu(config) and _has_gpu():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


def _wants_gpu(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr") or ""
    return "gpu" in expression and "not gpu" not in expression


def _has_gpu() -> bool:
    import jax

    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False
