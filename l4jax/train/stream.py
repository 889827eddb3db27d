"""Batches made by worker processes ahead of time, in order: training does not wait for Pillow."""

import contextlib
import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from l4jax.train.batches import Packed, Recipe, make_batch

AHEAD = 2  # batches that each worker is asked for beyond the one in use


@contextlib.contextmanager
def stream_batches(recipe: Recipe, start: int, workers: int) -> Iterator[Iterator[Packed]]:
    """The batches of the steps from `start` on, for use in a `with`.

    Args:
        recipe: of the batches.
        start: number of the first.
        workers: processes; 0 makes each batch here, when it is asked for.
    """
    if workers == 0:
        yield (make_batch(recipe, step) for step in range(start, recipe.steps))
        return
    # Pictures are large: they come as files, which the system keeps in memory, not through pipes.
    with tempfile.TemporaryDirectory(prefix="batches-") as scratch, _one_thread_each():
        # Spawned, for a fork of a process that runs jax may hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_be_alone)
        try:
            yield _receive(pool, recipe, start, workers * AHEAD, Path(scratch))
        finally:
            pool.shutdown(cancel_futures=True)


def _receive(
    pool: ProcessPoolExecutor, recipe: Recipe, start: int, ahead: int, scratch: Path
) -> Iterator[Packed]:
    asked: list[Future[Packed]] = []
    with ThreadPoolExecutor(1) as reader:
        for step in range(start, recipe.steps + ahead):
            if step < recipe.steps:
                written = pool.submit(_write_batch, recipe, step, scratch)
                asked.append(reader.submit(lambda file: _read(file.result()), written))
            if step >= start + ahead and asked:
                yield asked.pop(0).result()


_THREADS = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start in this block find in their environment that they have one core each;
    numpy looks when it is imported, which is before anything of ours runs.
    """
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(_THREADS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _be_alone() -> None:
    """A worker leaves Ctrl-C to its parent."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_batch(recipe: Recipe, step: int, scratch: Path) -> Path:
    path = scratch / f"{step}.npy"
    with path.open("wb") as file:  # one behind the other: an archive would be checked byte by byte
        for array in vars(make_batch(recipe, step)).values():
            np.save(file, array)
    return path


def _read(path: Path) -> Packed:
    with path.open("rb") as file:
        arrays = [np.load(file) for _ in dataclasses.fields(Packed)]
    path.unlink()
    return Packed(*arrays)
