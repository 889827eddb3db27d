"""Compiled programs: several compiled at a time, some while others already serve, and kept on disk
for the next start.

jax keeps what it compiled too, but finds it by the lowered program, and to lower one of 48 layers
takes Python seconds. Here it is found by what goes into that: sources, versions, devices,
shapes.
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
from typing import Any

import jax
import jaxlib.version
from flax import linen as nn
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)

_COMPILERS = 16  # at once
_CORES_EACH = 4  # for one that compiles while others are served
_KEPT = 100  # programs on disk, of which a model on a mesh has about 20


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted function and what it is called with: arrays, or what tells their shapes and places;
    and static keywords.
    """

    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]

    def describe(self) -> "Call":
        """The same without the arrays, so that these can be donated meanwhile."""
        return dataclasses.replace(self, arguments=jax.tree.map(_describe, self.arguments))


class Executables:
    """The compiled programs of one runner, by keys of its choice.

    Args:
        about: what they depend on beside their sources, arguments and static numbers.
        devices: that they run on.
        entered: gives the context that they are traced in.
        folder: where they are kept; None is nowhere.
    """

    def __init__(
        self,
        about: str,
        devices: Sequence[Any],
        entered: Callable[[], contextlib.AbstractContextManager[None]],
        folder: Path | None,
    ):
        self._about, self._devices, self._entered = about, devices, entered
        self._folder = folder
        self._found: dict[Hashable, Future[Any]] = {}
        self._lowering = threading.Lock()

    def run(self, key: Hashable, call: Call) -> Any:
        """Call a program: the one of this key, awaited if it is being compiled; where there is
        none, as jax does, who compiles it now.
        """
        future = self._found.get(key)
        if future is None:
            return call.function(*call.arguments, **call.static)
        return future.result()(*call.arguments)

    def compile(self, calls: Mapping[Hashable, Call], *, progress: bool = False) -> None:
        """Compile programs, several at a time, and wait for all of them. They are lowered in this
        order: those that take long to compile come first.
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
        self._found |= futures

    def compile_behind(self, calls: Mapping[Hashable, Call]) -> None:
        """Compile programs in this order, while others run; a few at a time where there are cores
        to spare."""
        todo = [(Future(), call.describe()) for call in calls.values()]
        self._found |= zip(calls, (future for future, _ in todo), strict=True)
        left = iter(todo)  # of all threads

        def work() -> None:
            for future, call in left:
                if not threading.main_thread().is_alive():  # the process is ending
                    future.cancel()
                    continue
                try:
                    future.set_result(self._make(call))
                except Exception as error:  # who wants the program is told
                    future.set_exception(error)

        for _ in range(max(1, (os.cpu_count() or 1) // _CORES_EACH)):
            threading.Thread(target=work, name="compiling").start()

    def has(self, key: Hashable) -> bool:
        """Whether a program is there, and none waits for it."""
        future = self._found.get(key)
        if future is None or not future.done() or future.cancelled():
            return False
        return future.exception() is None

    def knows(self, key: Hashable) -> bool:
        """Whether it is compiled here at all, sooner or later; else jax does so when it is run."""
        return key in self._found

    @property
    def is_compiling(self) -> bool:
        """Whether something is being compiled."""
        return not all(future.done() for future in self._found.values())

    def wait(self, *, progress: bool = False) -> None:
        """Wait for all that is being compiled."""
        left = [future for future in self._found.values() if not future.done()]
        for _ in _watch(left, "compiling the rest", progress):
            pass

    def _make(
        self,
        call: Call,
        before: threading.Event | None = None,
        after: threading.Event | None = None,
    ) -> Any:
        """A program, as it was kept or anew: lowered once `before` is set, and then `after` is."""
        file, made, lowered = None, None, None
        try:
            file = self._locate(call)
            made = _read(file, self._devices) if file else None
            if made is None:
                if before is not None:
                    before.wait()
                # Python lowers one after the other; the compiler, which takes longer, needs none.
                with self._lowering, self._entered():
                    lowered = call.function.lower(*call.arguments, **call.static)
        finally:
            if after is not None:
                after.set()
        if lowered is not None:
            made = lowered.compile()
            if file:
                _write(file, made)
        return made

    def _locate(self, call: Call) -> Path | None:
        if self._folder is None:
            return None
        leaves = jax.tree_util.tree_leaves_with_path(call.describe().arguments)
        shapes = [f"{jax.tree_util.keystr(path)} {x} {x.sharding}" for path, x in leaves]
        # What a module is, `about` tells: printed, its kernels would be addresses.
        static = [pair for pair in call.static.items() if not isinstance(pair[1], nn.Module)]
        client = self._devices[0].client
        words = [
            *(self._about, hash_sources(), jax.__version__, jaxlib.version.__version__),
            *(client.platform_version, self._devices[0].device_kind),
            *(str([device.id for device in self._devices]), os.environ.get("XLA_FLAGS", "")),
            *(call.function.__name__, repr(static), *shapes),
        ]
        return self._folder / hashlib.sha256("\n".join(words).encode()).hexdigest()


def _watch(futures: Collection[Future[Any]], what: str, progress: bool) -> Iterator[Future[Any]]:
    """Programs as they are done, beneath a bar."""
    from tqdm import tqdm

    bar: Any = {"desc": what, "total": len(futures), "unit": "program", "disable": not progress}
    yield from tqdm(as_completed(futures), **bar)


@functools.cache
def hash_sources() -> str:
    """A digest of the sources of the packages that programs are made of."""
    digest = hashlib.sha256()
    for package in ("l4jax", "sharding"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _describe(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _read(file: Path, devices: Sequence[Any]) -> Any:
    """What was kept; None where nothing was, or nothing that can be used."""
    try:
        kept = pickle.loads(file.read_bytes())
        made = serialize_executable.deserialize_and_load(*kept, execution_devices=devices)
        _mark_used(file)
        return made
    except FileNotFoundError:
        return None
    except Exception as error:  # cut short, or of another world: it is made anew
        logger.warning("compiling anew: %s: %s", file, error)
        return None


def _mark_used(file: Path) -> None:
    """The last one used is the last one forgotten. (By itself a file's clock ticks every 4 ms.)"""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _find_last_use(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # a draft that has its name by now, or what another one has forgotten
        return math.inf


def _write(file: Path, made: Any) -> None:
    """Keep a program, whole or not at all, and forget those that were used longest ago."""
    try:
        kept = pickle.dumps(serialize_executable.serialize(made))
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as draft:
            draft.write(kept)
        _mark_used(Path(draft.name))
        os.replace(draft.name, file)
        for old in sorted(file.parent.iterdir(), key=_find_last_use)[:-_KEPT]:
            old.unlink(missing_ok=True)
    except Exception as error:  # a full disk, or another process was faster: this start goes on
        logger.warning("a compiled program was not kept: %s", error)
