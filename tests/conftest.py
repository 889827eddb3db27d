"""The ground that all tests stand on: eight CPU devices, no network, and no program that an earlier
run has compiled.
"""

import gc
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Set before jax starts, and in the environment so that the processes that tests start have it too.
os.environ.setdefault("NPROC", "16")  # XLA's threads: with as few as cores, collectives deadlock
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What an earlier run left behind must not decide: processes keep no programs, and this one keeps
# them, for as long as it lasts, in a folder of its own. (One module's are another's: a fifth less.)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
PROGRAMS = tempfile.TemporaryDirectory(prefix="l4jax-programs-")

DEVICES = 8
GPU_PROCESSES = 4  # side by side: what their tests wait for is a thread that compiles
ORACLES = ("compressed_tensors", "peft", "torch", "transformers")
MISSING = [name for name in ORACLES if importlib.util.find_spec(name) is None]

# Python 3.11 has them all or no torch: what else is missing there is an error, and no choice.
IS_LEFT_OUT = "torch" in MISSING or (bool(MISSING) and sys.version_info >= (3, 12))
collect_ignore = ["reference"] if IS_LEFT_OUT else []


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Tests on a GPU run in several processes, unless `-n` says in how many."""
    is_open = getattr(config.option, "numprocesses", 0) is None  # of xdist, which may be missing
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_open and not is_worker and _wants_gpu(config) and not config.option.collectonly:
        config.option.numprocesses = GPU_PROCESSES


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
    jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Each program takes mappings of memory; a process may have 65,530, and crashes beyond."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


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
