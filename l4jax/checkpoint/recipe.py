"""Recipes: the stored tensors that make up a parameter; and reading a box of one."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np

Box = tuple[slice, ...]
T = TypeVar("T")
_COPY_BYTES = 16 * 2**20  # bytes that one thread copies at a time
# Copies between two releases of mapped pages. Columns of rows that are shorter than a page touch
# every page of the rows: eight times the bytes copied, where eight devices share a row.
_COPIES_PER_RELEASE = 16


@dataclasses.dataclass(frozen=True)
class Source:
    """A stored tensor as a box of a parameter.

    Attributes:
        name: of the tensor.
        stored_shape: the shape that it must have in the file.
        start: the box's first corner.
        shape: of the box, to which the tensor is reshaped.
    """

    name: str
    stored_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sources that tile an array of `shape`, which is the parameter after a transposition.

    The device transposes: numpy's strided copy of 200 GB takes many minutes.

    Attributes:
        sources: disjoint boxes that fill the array.
        shape: of the array, its axes in the files' order.
        permutation: as `jnp.transpose` takes it, from the array to the parameter; None if the
            parameter's axes are in the files' order.
    """

    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None

    @property
    def file_axes(self) -> tuple[int, ...]:
        """For each axis of the parameter, its number in the files' order."""
        return self.permutation or tuple(range(len(self.shape)))

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter; `shape` is in the files' order."""
        return tuple(self.shape[axis] for axis in self.file_axes)

    def to_file_order(self, items: Sequence[T]) -> tuple[T, ...]:
        """Reorder one item per axis of the parameter, such as a name, to the files' order."""
        return tuple(items[self.file_axes.index(axis)] for axis in range(len(items)))


def read_box(
    recipe: Recipe,
    view: Callable[[str], np.ndarray],
    box: Box,
    dtype: Any,
    pool: Executor,
    release: Callable[[Iterable[str]], None] = lambda _: None,
) -> np.ndarray:
    """Read a box of a recipe's array (in the files' axis order), with the threads of a pool.

    Args:
        view: name -> stored tensor, mapped and not read yet.
        box: one slice per axis, without a step.
        dtype: to which values are converted.
        release: called during reading with the names of tensors whose mapped pages may be dropped,
            so that memory holds few of them.
    """
    spans = [span.indices(size)[:2] for span, size in zip(box, recipe.shape, strict=True)]
    out = np.empty([stop - start for start, stop in spans], dtype)
    copies = []
    for source in recipe.sources:
        inside, target = [], []
        for (start, stop), at, size in zip(spans, source.start, source.shape, strict=True):
            low, high = max(start, at), min(stop, at + size)
            inside.append(slice(low - at, high - at))
            target.append(slice(low - start, high - start))
        if all(cut.start < cut.stop for cut in inside):
            values = view(source.name).reshape(source.shape)[tuple(inside)]
            copies += [(*copy, source.name) for copy in _split_copy(out[tuple(target)], values)]
    for at in range(0, len(copies), _COPIES_PER_RELEASE):
        targets, values, names = zip(*copies[at : at + _COPIES_PER_RELEASE], strict=True)
        for _ in pool.map(_copy, targets, values):
            pass
        release(dict.fromkeys(names))
    return out


def _copy(target: np.ndarray, values: np.ndarray) -> None:
    np.copyto(target, values, casting="unsafe")


def _split_copy(target: np.ndarray, values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split a copy along its first axis that is longer than 1, so that threads share the work."""
    axis = next((axis for axis, size in enumerate(target.shape) if size > 1), None)
    count = -(-target.nbytes // _COPY_BYTES)
    if axis is None or count < 2:
        yield target, values
        return
    step = -(-target.shape[axis] // count)
    for start in range(0, target.shape[axis], step):
        piece = (slice(None),) * axis + (slice(start, start + step),)
        yield target[piece], values[piece]
