"""An adapter of low rank (LoRA, arXiv:2106.09685) as a value: what it adds to which parameters.

To a parameter W of `l4jax.model` it adds alpha / rank * second @ first, two factors in W's own
axes. Query, key and value have a first factor each, as have gate and up of what is not fused, since
PEFT adapts them as matrices of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from l4jax import axes
from l4jax.checkpoint.names import count_summed, find_published
from l4jax.checkpoint.recipe import Part, Recipe
from l4jax.checkpoint.rules import Shape
from l4jax.kernels.formats import Adapted, dequantize

# Of one parameter: "first" [out.., Q, in..], whose axes of `out` count the parts that it tells
# apart, and "second" [out.., Q].
Factors = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no yes-or-no equality
class Adapter:
    """What is added to a model's parameters.

    Attributes:
        rank: Q of all factors.
        alpha: what is added is alpha / rank times the product of the factors.
        factors: path of a parameter, as in "text/layer_3/attention/qkv" -> its factors, float32.
        origin: what holds it, for errors.
    """

    rank: int
    alpha: float
    factors: Mapping[str, Factors]
    origin: str = "the adapter"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def merge(self, path: str, array: jax.Array, order: tuple[int, ...] | None = None) -> jax.Array:
        """A parameter with what the adapter adds, where it lies; the one without is freed.

        It is added in float32, and rounded once. A device holds its part of what is added, beside
        its part of the parameter before and after.

        Args:
            path: of the parameter; one that is not adapted comes back as it is.
            array: the parameter.
            order: by which the array is to be transposed to be the parameter; it stays as it is.
        """
        if path not in self.factors:
            return array
        order = order or tuple(range(array.ndim))
        shape = tuple(array.shape[axis] for axis in order)
        adapted = adapt(path, shape, self.factors[path], self.scale)
        add = _make_add(order, array.sharding)
        merged = jax.block_until_ready(add(array, *(np.asarray(x, np.float32) for x in adapted)))
        array.delete()
        return merged


def adapt(path: str, shape: Shape, factors: Factors, scale: float) -> tuple[Any, Any]:
    """The factors of a parameter as `Adapted` has them: spread over its axes, and scaled."""
    first, second = factors["first"], factors["second"]
    recipe = find_published(path, shape, is_whole=False)
    for axis, parts in enumerate(first.shape[: second.ndim - 1]):
        if 1 < parts < shape[axis]:
            sizes = np.diff([*list_starts(recipe, axis), shape[axis]])
            first = first.take(np.repeat(np.arange(parts), sizes), axis)
    return first, second * scale


def list_starts(recipe: Recipe, axis: int) -> list[int]:
    """Where the parts of a parameter begin along an axis of `out`, in order."""
    return sorted({part.start[axis] for part in recipe.parts})


def count_parts(path: str, shape: Shape) -> tuple[int, ...] | None:
    """How many firsts an adapter has along each axis of `out`; None for what cannot be adapted."""
    summed = count_summed(path)
    if summed is None:
        return None
    recipe = find_published(path, shape, is_whole=False)
    outs = len(shape) - summed
    if recipe.order is not None:  # fused experts: one each
        return (shape[0], *[1] * (outs - 1))
    return tuple(len(list_starts(recipe, axis)) for axis in range(outs))


def shape_factors(path: str, shape: Shape, rank: int) -> tuple[Shape, Shape] | None:
    """The shapes of `first` and `second`; None for what cannot be adapted."""
    parts = count_parts(path, shape)
    if parts is None:
        return None
    outs = len(parts)
    return (*parts, rank, *shape[outs:]), (*shape[:outs], rank)


def name_factors(path: str, shape: Shape, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The logical names of the factors' axes, of those of the parameter."""
    parts = count_parts(path, shape)
    assert parts is not None, path
    outs = len(parts)
    told = zip(parts, shape, names, strict=False)
    apart = (name if count == size else axes.PARTS for count, size, name in told)
    return {"first": (*apart, axes.RANK, *names[outs:]), "second": (*names[:outs], axes.RANK)}


def find_box(factors: Factors, recipe: Recipe, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """What of the factors belongs to one stored matrix: views, [Q, in..] and [out.., Q]."""
    outs = factors["second"].ndim - 1
    place = tuple(list_starts(recipe, axis).index(part.start[axis]) for axis in range(outs))
    box = tuple(
        slice(start, start + size)
        for start, size in zip(part.start[:outs], part.shape[:outs], strict=True)
    )
    return factors["first"][place], factors["second"][box]


@functools.cache
def _make_add(order: tuple[int, ...], sharding: Sharding) -> Callable[..., jax.Array]:
    def add(array: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        weight = jnp.transpose(array, order)
        merged = dequantize(Adapted(weight, first, second), array.dtype)
        return jnp.transpose(merged, [order.index(axis) for axis in range(len(order))])

    return jax.jit(add, out_shardings=sharding)
