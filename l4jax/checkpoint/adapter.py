"""LoRA adapters (arXiv:2106.09685) as values: low-rank factors of parameters.

An adapter adds alpha / rank * second @ first to a parameter W of `l4jax.model`; both factors have
W's own axes. Query, key and value have a first factor each, as have gate and up of dense layers,
since PEFT adapts them as separate matrices.
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
from l4jax.checkpoint.layouts import Shape
from l4jax.checkpoint.names import count_in_axes, make_published_recipe
from l4jax.checkpoint.recipe import Recipe, Source
from l4jax.kernels.formats import Adapted, dequantize

# The factors of one parameter: "first" [out.., Q, in..] (LoRA's A), "second" [out.., Q] (B). The
# `out` axes of "first" count the separately adapted parts of the parameter, not its outputs.
Factors = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no boolean equality
class Adapter:
    """Low-rank factors of a model's parameters.

    Attributes:
        rank: Q of all factors.
        alpha: the product of the factors is multiplied by alpha / rank.
        factors: path of a parameter, as in "text/layer_3/attention/qkv" -> its factors, float32.
        origin: the adapter's folder, for errors.
        copies: weights of the model that the adapter stores, too: name -> values, unconverted.
    """

    rank: int
    alpha: float
    factors: Mapping[str, Factors]
    origin: str = "the adapter"
    copies: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def merge(
        self, path: str, array: jax.Array, permutation: tuple[int, ...] | None = None
    ) -> jax.Array:
        """Merge the adapter into a parameter on its devices, and delete the original.

        The sum is computed in float32 and rounded once. A device holds its slices of the parameter
        before and after, and of the factors' product.

        Args:
            path: of the parameter; one without factors is returned as it is.
            array: the parameter, its axes in the files' order.
            permutation: transposes the array to the parameter; the result is in the array's order.
        """
        if path not in self.factors:
            return array
        permutation = permutation or tuple(range(array.ndim))
        shape = tuple(array.shape[axis] for axis in permutation)
        factors = expand_factors(path, shape, self.factors[path], self.scale)
        add = _compile_add(permutation, array.sharding)
        merged = jax.block_until_ready(add(array, *(np.asarray(x, np.float32) for x in factors)))
        array.delete()
        return merged


def expand_factors(path: str, shape: Shape, factors: Factors, scale: float) -> tuple[Any, Any]:
    """Expand factors to `Adapted.first` and `Adapted.second`: repeated along `out`, and scaled."""
    first, second = factors["first"], factors["second"]
    recipe = make_published_recipe(path, shape, has_vision=False)
    for axis, parts in enumerate(first.shape[: second.ndim - 1]):
        if 1 < parts < shape[axis]:
            sizes = np.diff([*list_starts(recipe, axis), shape[axis]])
            first = first.take(np.repeat(np.arange(parts), sizes), axis)
    return first, second * scale


def list_starts(recipe: Recipe, axis: int) -> list[int]:
    """List where a parameter's stored tensors begin along an axis of `out`, in order."""
    return sorted({source.start[axis] for source in recipe.sources})


def count_parts(path: str, shape: Shape) -> tuple[int, ...] | None:
    """Count the separately adapted parts along each axis of `out`; None if there can be none."""
    in_axes = count_in_axes(path)
    if in_axes is None:
        return None
    recipe = make_published_recipe(path, shape, has_vision=False)
    out_axes = len(shape) - in_axes
    if recipe.permutation is not None:  # one part per fused expert
        return (shape[0], *[1] * (out_axes - 1))
    return tuple(len(list_starts(recipe, axis)) for axis in range(out_axes))


def shape_factors(path: str, shape: Shape, rank: int) -> tuple[Shape, Shape] | None:
    """Compute the shapes of `first` and `second`; None for a parameter that is no matrix."""
    parts = count_parts(path, shape)
    if parts is None:
        return None
    out_axes = len(parts)
    return (*parts, rank, *shape[out_axes:]), (*shape[:out_axes], rank)


def name_factors(path: str, shape: Shape, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Name the axes of the factors, given the logical names of the parameter's axes."""
    parts = count_parts(path, shape)
    assert parts is not None, path
    out_axes = len(parts)
    outs = zip(parts, shape, names, strict=False)
    parts_names = (name if count == size else axes.PARTS for count, size, name in outs)
    return {
        "first": (*parts_names, axes.RANK, *names[out_axes:]),
        "second": (*names[:out_axes], axes.RANK),
    }


def slice_factors(
    factors: Factors, recipe: Recipe, source: Source
) -> tuple[np.ndarray, np.ndarray]:
    """Slice the factors of one stored matrix: views, [Q, in..] and [out.., Q]."""
    out_axes = factors["second"].ndim - 1
    part = tuple(list_starts(recipe, axis).index(source.start[axis]) for axis in range(out_axes))
    box = tuple(
        slice(start, start + size)
        for start, size in zip(source.start[:out_axes], source.shape[:out_axes], strict=True)
    )
    return factors["first"][part], factors["second"][box]


@functools.cache
def _compile_add(permutation: tuple[int, ...], sharding: Sharding) -> Callable[..., jax.Array]:
    def add(array: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        weight = jnp.transpose(array, permutation)
        merged = dequantize(Adapted(weight, first, second), array.dtype)
        return jnp.transpose(merged, [permutation.index(axis) for axis in range(len(permutation))])

    return jax.jit(add, out_shardings=sharding)
