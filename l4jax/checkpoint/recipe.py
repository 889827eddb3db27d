"""How a parameter is put together from stored tensors, and reading the box of it that is wanted."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np

Box = tuple[slice, ...]
OfAxis = TypeVar("OfAxis")
_PIECE = 16 * 2**20  # bytes that one thread copies at a time
# Pieces between two releases. Columns of rows that are shorter than a page touch all of its bytes:
# eight times the piece, where eight devices share a row.
_ROUND = 16


@dataclasses.dataclass(frozen=True)
class Part:
    """A stored tensor as a box of the parameter: reshaped to `shape`, with a corner at `start`."""

    name: str
    stored: tuple[int, ...]  # the shape it must have in the file
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Parts that tile an array of `shape`; transposed by `order`, if any, that is the parameter.

    Transposing is left to the device: numpy's strided copy of 200 GB takes many minutes.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None

    @property
    def turn(self) -> tuple[int, ...]:
        """The axis of the file that each of the parameter's axes is; in order if none is moved."""
        return self.order or tuple(range(len(self.shape)))

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter; `shape` is that of what the file has."""
        return tuple(self.shape[axis] for axis in self.turn)

    def reorder(self, names: Sequence[OfAxis]) -> tuple[OfAxis, ...]:
        """What each of the parameter's axes has, such as names, in the file's order."""
        return tuple(names[self.turn.index(axis)] for axis in range(len(names)))


def read_box(
    recipe: Recipe,
    view: Callable[[str], np.ndarray],
    box: Box,
    dtype: Any,
    pool: Executor,
    release: Callable[[Iterable[str]], None] = lambda _: None,
) -> np.ndarray:
    """Read a box of a recipe's array (in file order), converted to `dtype`, with a pool's threads.

    Args:
        view: the stored tensor of a name, without reading it.
        box: slices without a step, one an axis.
        release: is told now and then which tensors have been read as far as they will be at once,
            so that no more than a piece of them stays in memory.
    """
    spans = [span.indices(size)[:2] for span, size in zip(box, recipe.shape, strict=True)]
    out = np.empty([stop - start for start, stop in spans], dtype)
    copies = []
    for part in recipe.parts:
        inside, target = [], []
        for (start, stop), at, size in zip(spans, part.start, part.shape, strict=True):
            low, high = max(start, at), min(stop, at + size)
            inside.append(slice(low - at, high - at))
            target.append(slice(low - start, high - start))
        if all(cut.start < cut.stop for cut in inside):
            source = view(part.name).reshape(part.shape)[tuple(inside)]
            copies += [(*copy, part.name) for copy in _cut(out[tuple(target)], source)]
    for at in range(0, len(copies), _ROUND):
        targets, sources, names = zip(*copies[at : at + _ROUND], strict=True)
        for _ in pool.map(_copy, targets, sources):
            pass
        release(dict.fromkeys(names))
    return out


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    np.copyto(target, source, casting="unsafe")


def _cut(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a copy along its first axis that can be cut, so that threads share the work."""
    axis = next((axis for axis, size in enumerate(target.shape) if size > 1), None)
    count = -(-target.nbytes // _PIECE)
    if axis is None or count < 2:
        yield target, source
        return
    step = -(-target.shape[axis] // count)
    for start in range(0, target.shape[axis], step):
        piece = (slice(None),) * axis + (slice(start, start + step),)
        yield target[piece], source[piece]
