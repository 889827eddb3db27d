"""The program cache: compiled programs by key, in memory and on disk.

Several programs compile at once, some of them while the engine serves. JAX's own compilation cache
finds a program by its lowered text, and lowering a step of 48 layers takes seconds of Python. This
cache finds it by the inputs of the lowering: sources, versions, devices, shapes and static
arguments. A second start therefore lowers and compiles nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import logging
import math
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jaxlib.version
from flax import linen as nn
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)

_COMPILERS = 16  # threads
_CORES_PER_COMPILER = 4  # of background compilation
_KEPT = 100  # programs on disk; a model on a mesh has about 20


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with its static arguments: it traces for the arrays that it is called with.

    Attributes:
        function: a jitted function.
        static: its static keyword arguments.
    """

    function: Any
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **self.static)

    def lower(self, *arguments: Any) -> Any:
        """Trace and lower for arrays, or for descriptions of arrays."""
        return self.function.lower(*arguments, **self.static)


# A program and its arguments: arrays, or descriptions of their shapes and shardings.
Call: TypeAlias = tuple[Program, tuple[Any, ...]]


class ProgramCache:
    """The compiled programs of one runner.

    Args:
        about: text of what programs depend on in addition to sources, arguments and static values.
        devices: the devices that run the programs.
        context: makes the context in which programs are traced.
        folder: the folder of programs on disk; None keeps none.
    """

    def __init__(
        self,
        about: str,
        devices: Sequence[Any],
        context: Callable[[], contextlib.AbstractContextManager[None]],
        folder: Path | None,
    ):
        self._about, self._devices, self._context = about, devices, context
        self._folder = folder
        self._compiled: dict[Hashable, Future[Any]] = {}
        self._lowering = threading.Lock()

    def run(self, key: Hashable, program: Program, arguments: tuple[Any, ...]) -> Any:
        """Run the compiled program of a key; wait for it if it is being compiled.

        A key that was never compiled here runs through `jax.jit`, which compiles it now.
        """
        future = self._compiled.get(key)
        return program(*arguments) if future is None else future.result()(*arguments)

    def compile(self, calls: Mapping[Any, Call], *, progress: bool = False) -> None:
        """Compile programs, several at once, and wait for them.

        They are lowered in this order: put programs first that take long to compile.
        """
        futures: dict[Hashable, Future[Any]] = {}
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _COMPILERS)) as threads:
            before = None
            for key, call in calls.items():
                lowered = threading.Event()
                futures[key] = threads.submit(self._make, call, before, lowered)
                before = lowered
            for future in _watch(futures.values(), "compiling", progress):
                future.result()
        self._compiled |= futures

    def compile_in_background(self, calls: Mapping[Any, Call]) -> None:
        """Compile programs in this order while others run; on many cores several at once."""
        # Descriptions instead of arrays: the engine donates the arrays meanwhile.
        todo = [
            (Future(), (program, jax.tree.map(_describe, arguments)))
            for program, arguments in calls.values()
        ]
        self._compiled |= zip(calls, (future for future, _ in todo), strict=True)
        left = iter(todo)  # shared by the threads

        def work() -> None:
            for future, call in left:
                if not threading.main_thread().is_alive():  # the process ends
                    future.cancel()
                    continue
                try:
                    future.set_result(self._make(call))
                except Exception as error:  # raised by `run`
                    future.set_exception(error)

        for _ in range(max(1, (os.cpu_count() or 1) // _CORES_PER_COMPILER)):
            threading.Thread(target=work, name="compiling").start()

    def is_ready(self, key: Hashable) -> bool:
        """Return whether a program is compiled, so that running it does not wait."""
        future = self._compiled.get(key)
        if future is None or not future.done() or future.cancelled():
            return False
        return future.exception() is None

    def is_known(self, key: Hashable) -> bool:
        """Return whether a program is compiled, or is scheduled to be."""
        return key in self._compiled

    @property
    def is_compiling(self) -> bool:
        """Whether a program is being compiled."""
        return not all(future.done() for future in self._compiled.values())

    def wait(self, *, progress: bool = False) -> None:
        """Wait for all programs that are being compiled."""
        left = [future for future in self._compiled.values() if not future.done()]
        for _ in _watch(left, "compiling the rest", progress):
            pass

    def _make(
        self,
        call: Call,
        before: threading.Event | None = None,
        after: threading.Event | None = None,
    ) -> Any:
        """Read a program from disk, or compile it: lower once `before` is set, then set `after`."""
        (program, arguments), file, made, lowered = call, None, None, None
        try:
            file = self._locate(call)
            made = _read(file, self._devices) if file else None
            if made is None:
                if before is not None:
                    before.wait()
                # Lowering is Python and holds one lock; compiling, which takes longer, does not.
                with self._lowering, self._context():
                    lowered = program.lower(*arguments)
        finally:
            if after is not None:
                after.set()
        if lowered is not None:
            made = lowered.compile()
            if file:
                _write(file, made)
        return made

    def _locate(self, call: Call) -> Path | None:
        """Return the file of a program: a digest of all that its lowering depends on."""
        if self._folder is None:
            return None
        program, arguments = call
        leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(_describe, arguments))
        shapes = [f"{jax.tree_util.keystr(path)} {x} {x.sharding}" for path, x in leaves]
        # `about` describes modules: the repr of a module holds addresses of its kernels.
        static = [pair for pair in program.static.items() if not isinstance(pair[1], nn.Module)]
        client = self._devices[0].client
        words = [
            *(self._about, hash_sources(), jax.__version__, jaxlib.version.__version__),
            *(client.platform_version, self._devices[0].device_kind),
            *(str([device.id for device in self._devices]), os.environ.get("XLA_FLAGS", "")),
            *(program.function.__name__, repr(static), *shapes),
        ]
        return self._folder / hashlib.sha256("\n".join(words).encode()).hexdigest()


def find_program_folder(device: Any) -> Path | None:
    """Return the folder of programs on disk, inside JAX's compilation cache; None without one.

    Only GPU programs of one process are kept. A CPU compiles faster, and for its exact processor.
    """
    settings: Any = jax.config  # its type declares no settings
    parent = settings.jax_compilation_cache_dir
    if not parent or "://" in parent or not settings.jax_enable_compilation_cache:
        return None
    is_kept = device.platform == "gpu" and jax.process_count() == 1
    return Path(parent) / "executables" if is_kept else None


def enable_compilation_cache(folder: Path) -> None:
    """Keep compiled programs in a folder for the next start, unless the user configured JAX's."""
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("false", "0"):
        return
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@functools.cache
def hash_sources() -> str:
    """Return a digest of the sources that programs are made of."""
    digest = hashlib.sha256()
    for package in ("l4jax", "sharding"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _watch(futures: Collection[Future[Any]], label: str, progress: bool) -> Iterator[Future[Any]]:
    """Yield futures as they finish, with a progress bar."""
    from tqdm import tqdm

    bar: Any = {"desc": label, "total": len(futures), "unit": "program", "disable": not progress}
    yield from tqdm(as_completed(futures), **bar)


def _describe(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _read(file: Path, devices: Sequence[Any]) -> Any:
    """Read a program; None where there is none, or none that loads."""
    try:
        kept = pickle.loads(file.read_bytes())
        made = serialize_executable.deserialize_and_load(*kept, execution_devices=devices)
        _mark_used(file)
        return made
    except FileNotFoundError:
        return None
    except Exception as error:  # truncated, or of another version: compile it again
        logger.warning("compiling again: %s: %s", file, error)
        return None


def _mark_used(file: Path) -> None:
    """Set a file's time to now, for eviction by last use (the file system ticks every 4 ms)."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _find_last_use(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # renamed or evicted by another process
        return math.inf


def _write(file: Path, made: Any) -> None:
    """Write a program, whole or not at all, and evict the least recently used ones."""
    try:
        kept = pickle.dumps(serialize_executable.serialize(made))
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as draft:
            draft.write(kept)
        _mark_used(Path(draft.name))
        os.replace(draft.name, file)
        for old in sorted(file.parent.iterdir(), key=_find_last_use)[:-_KEPT]:
            old.unlink(missing_ok=True)
    except Exception as error:  # a full disk, or a race with another process: this start goes on
        logger.warning("a compiled program was not kept: %s", error)
