"""The data loader: worker processes make batches ahead of time and in order."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from l4jax.train.batches import DataConfig, PackedBatch, make_batch

PREFETCH = 2  # batches per worker beyond the one in use


@contextlib.contextmanager
def stream_batches(data: DataConfig, start: int, workers: int) -> Iterator[Iterator[PackedBatch]]:
    """Iterate over the batches of the steps from `start` on, inside a `with`.

    Args:
        data: the configuration of the batches.
        start: the first step.
        workers: processes; 0 makes each batch in this process, on demand.
    """
    if workers == 0:
        yield (make_batch(data, step) for step in range(start, data.steps))
        return
    # Images are large. Files, which the system keeps in memory, are faster than pipes.
    with tempfile.TemporaryDirectory(prefix="batches-") as scratch, _single_threaded():
        # Spawned: a fork of a process that runs jax may hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts)
        try:
            yield _receive(pool, data, start, workers * PREFETCH, Path(scratch))
        finally:
            pool.shutdown(cancel_futures=True)


def _receive(
    pool: ProcessPoolExecutor, data: DataConfig, start: int, prefetch: int, scratch: Path
) -> Iterator[PackedBatch]:
    pending: list[Future[PackedBatch]] = []
    with ThreadPoolExecutor(1) as reader:
        for step in range(start, data.steps + prefetch):
            if step < data.steps:
                written = pool.submit(_write_batch, data, step, scratch)
                pending.append(reader.submit(lambda file: _read(file.result()), written))
            if step >= start + prefetch and pending:
                yield pending.pop(0).result()


_THREADS = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Give processes that start in this block an environment of one thread each.

    numpy reads it when it is imported, before any code of l4jax runs.
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


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_batch(data: DataConfig, step: int, scratch: Path) -> Path:
    path = scratch / f"{step}.npy"
    # Arrays in sequence: the checksums of an .npz archive would cost time.
    with path.open("wb") as file:
        for array in vars(make_batch(data, step)).values():
            np.save(file, array)
    return path


def _read(path: Path) -> PackedBatch:
    with path.open("rb") as file:
        arrays = [np.load(file) for _ in dataclasses.fields(PackedBatch)]
    path.unlink()
    return PackedBatch(*arrays)
