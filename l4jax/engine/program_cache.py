"""The program cache: compiles several programs at once, some while requests run, and keeps the
executables on disk for the next start.

jax's compilation cache finds an executable by its lowered program, and lowering a program of 48
layers takes seconds of Python. This cache finds it by the inputs of lowering: sources, versions,
devices, shapes.
"""

import contextlib
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
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib.version
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)

_COMPILERS = 16  # threads of `compile`
_CORES_PER_COMPILER = 4  # in the background, while requests run
_CHECKSUM = hashlib.sha256().digest_size  # bytes in front of a program on disk
# Options of jax's cache: keep every program.
_CACHE_OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_KEPT = 100  # executables on disk; a model on a mesh has about 20


class Program(NamedTuple):
    """A jitted function, and arguments for which it is compiled."""

    key: Hashable
    fn: Any
    args: tuple[Any, ...]

    def abstract(self) -> "Program":
        """Replace arrays by their shapes and shardings, so that they can be donated meanwhile."""
        return self._replace(args=jax.tree.map(_abstract, self.args))


class ProgramCache:
    """The compiled programs of one runner, by key.

    Args:
        context: describes all that the programs depend on besides key, sources and arguments.
        devices: of the programs.
        activate: returns the context manager that they are traced in.
        folder: of the executables on disk; None keeps none.
    """

    def __init__(
        self,
        context: str,
        devices: Sequence[Any],
        activate: Callable[[], contextlib.AbstractContextManager[None]],
        folder: Path | None,
    ):
        self._context, self._devices, self._activate = context, devices, activate
        self._folder = folder if folder and _is_private(folder) else None
        self._executables: dict[Hashable, Future[Any]] = {}
        self._lowering = threading.Lock()

    def run(self, key: Hashable, fn: Any, args: tuple[Any, ...]) -> Any:
        """Run the program of a key, awaiting it if it is compiling.

        If it was not compiled ahead, `fn` compiles at this call.
        """
        future = self._executables.get(key)
        return (fn if future is None else future.result())(*args)

    def compile(self, programs: Sequence[Program], *, progress: bool = False) -> None:
        """Compile programs, several at once, and wait for all. They are lowered in this order: put
        those that compile longest first.
        """
        futures: dict[Hashable, Future[Any]] = {}
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _COMPILERS)) as threads:
            previous = None
            for program in programs:
                lowered = threading.Event()
                futures[program.key] = threads.submit(self._compile, program, previous, lowered)
                previous = lowered
            for future in _show_progress(futures.values(), "compiling", progress):
                future.result()
        self._executables |= futures

    def compile_in_background(self, programs: Sequence[Program]) -> None:
        """Compile programs in this order while others run, a few at once if there are cores."""
        todo = [(Future[Any](), program.abstract()) for program in programs]
        self._executables |= {program.key: future for future, program in todo}
        left = iter(todo)  # of all threads

        def work() -> None:
            for future, program in left:
                if not threading.main_thread().is_alive():  # the process is ending
                    future.cancel()
                    continue
                try:
                    future.set_result(self._compile(program))
                except Exception as error:  # raised by `run`
                    future.set_exception(error)

        for _ in range(max(1, (os.cpu_count() or 1) // _CORES_PER_COMPILER)):
            threading.Thread(target=work, name="compiling").start()

    def is_ready(self, key: Hashable) -> bool:
        """Return whether a program is compiled."""
        future = self._executables.get(key)
        if future is None or not future.done() or future.cancelled():
            return False
        return future.exception() is None

    @property
    def is_empty(self) -> bool:
        """True if no program was compiled ahead: each compiles at its first call."""
        return not self._executables

    @property
    def is_compiling(self) -> bool:
        """True if programs are compiling in the background."""
        return not all(future.done() for future in self._executables.values())

    def wait(self, *, progress: bool = False) -> None:
        """Wait for the programs that are compiling in the background."""
        left = [future for future in self._executables.values() if not future.done()]
        for _ in _show_progress(left, "compiling the rest", progress):
            pass

    def _compile(
        self,
        program: Program,
        previous: threading.Event | None = None,
        lowered: threading.Event | None = None,
    ) -> Any:
        """Load a program from disk, or compile it: lowered after `previous` is set; then `lowered`
        is."""
        file, executable, lowering = None, None, None
        try:
            file = self._locate(program)
            executable = _read(file, self._devices) if file else None
            if executable is None:
                if previous is not None:
                    previous.wait()
                # Lowering holds Python's lock; compiling takes longer, and does not.
                with self._lowering, self._activate():
                    lowering = program.fn.lower(*program.args)
        finally:
            if lowered is not None:
                lowered.set()
        if lowering is not None:
            executable = lowering.compile()
            if file:
                _write(file, executable)
        return executable

    def _locate(self, program: Program) -> Path | None:
        if self._folder is None:
            return None
        leaves = jax.tree_util.tree_leaves_with_path(program.abstract().args)
        shapes = [f"{jax.tree_util.keystr(path)} {x} {x.sharding}" for path, x in leaves]
        client = self._devices[0].client
        words = [
            *(self._context, hash_sources(), jax.__version__, jaxlib.version.__version__),
            *(client.platform_version, self._devices[0].device_kind),
            *(str([device.id for device in self._devices]), os.environ.get("XLA_FLAGS", "")),
            *(repr(program.key), *shapes),
        ]
        return self._folder / hashlib.sha256("\n".join(words).encode()).hexdigest()


def find_program_folder(device: Any) -> Path | None:
    """Return the folder of executables inside jax's compilation cache; None if nothing is kept.

    Only programs of one process on GPUs are kept: a CPU compiles faster, and for its exact model.
    """
    settings: Any = jax.config  # its type has no settings
    parent = settings.jax_compilation_cache_dir
    if not parent or "://" in parent or not settings.jax_enable_compilation_cache:
        return None
    is_kept = device.platform == "gpu" and jax.process_count() == 1
    return Path(parent) / "executables" if is_kept else None


def enable_compilation_cache(folder: Path) -> str | None:
    """Let jax keep compiled programs in a folder, unless the user configures jax's cache.

    The user's options win, in the environment or in `jax.config`.

    Returns:
        A line for the user if the folder cannot be written: nothing is kept then.
    """
    settings: Any = jax.config  # its type has no settings
    if not settings.jax_enable_compilation_cache or settings.jax_compilation_cache_dir:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a read-only file system has folders, too
            pass
    except OSError as error:
        return (
            f"Compiled programs are not kept ({error.strerror}: {folder}): "
            "set L4JAX_CACHE to a folder that can be written."
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in _CACHE_OPTIONS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return None


@functools.cache
def hash_sources() -> str:
    """Hash the sources of the packages that programs are made of."""
    digest = hashlib.sha256()
    for package in ("l4jax", "sharding"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _show_progress(
    futures: Collection[Future[Any]], description: str, progress: bool
) -> Iterator[Future[Any]]:
    """Yield programs as they are compiled, with a progress bar."""
    from tqdm import tqdm

    bar: Any = {
        "desc": description,
        "total": len(futures),
        "unit": "program",
        "disable": not progress,
    }
    yield from tqdm(as_completed(futures), **bar)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _is_private(folder: Path) -> bool:
    """Return whether a folder is this user's alone to write, or still to be made.

    Unpickling runs code that the file names, so a file of another user is not read.
    """
    if not folder.is_dir():
        return True
    found = folder.stat()
    if found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return True
    logger.warning(
        "compiled programs are not kept: other users may write to %s; chmod 700 it, or remove it",
        folder,
    )
    return False


def _hash_file(file: Path, kept: bytes) -> bytes:
    """Hash a program and its file's name, which is its key."""
    return hashlib.sha256(file.name.encode() + kept).digest()


def _read(file: Path, devices: Sequence[Any]) -> Any:
    """Load an executable; None if there is none. A file that cannot be used is removed."""
    try:
        written = file.read_bytes()
        checksum, kept = written[:_CHECKSUM], written[_CHECKSUM:]
        if checksum != _hash_file(file, kept):
            raise ValueError("the file is damaged, or of another program")
        executable = serialize_executable.deserialize_and_load(
            *pickle.loads(kept), execution_devices=devices
        )
        _mark_used(file)
        return executable
    except FileNotFoundError:
        return None
    except Exception as error:  # truncated, or written by another version
        logger.warning("compiling again: %s: %s", file, error)
        with contextlib.suppress(OSError):
            file.unlink()
        return None


def _mark_used(file: Path) -> None:
    """Set a file's time to now, in nanoseconds; the file system's own clock ticks every 4 ms."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _find_last_use(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # renamed or evicted by another process
        return math.inf


def _write(file: Path, executable: Any) -> None:
    """Write an executable atomically, and evict those that were used longest ago."""
    try:
        kept = pickle.dumps(serialize_executable.serialize(executable))
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            try:
                temporary.write(_hash_file(file, kept) + kept)
                temporary.flush()
                _mark_used(Path(temporary.name))
                os.replace(temporary.name, file)
            except BaseException:
                os.unlink(temporary.name)
                raise
        for old in sorted(file.parent.iterdir(), key=_find_last_use)[:-_KEPT]:
            old.unlink(missing_ok=True)
    except Exception as error:  # such as a full disk; the start goes on
        logger.warning("a compiled program was not kept: %s", error)
