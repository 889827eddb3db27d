"""Weights as values with a format: an array, data and scales in fp8 or int4, or either with an
adapter.

Every format ends in the axes that a product sums over, so a weight and its scales are cut alike.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0  # the largest e4m3fn
# Of -8..7 the -8 is left unused: with amax / 7 the largest of a group is exact whatever its sign,
# and none is further off than half a step. With amax / 7.5 a largest one that is positive would be
# cut off, half a step wrong each time.
INT4_MAX = 7.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in few bits. Its format is told by the dtype of its data.

    Attributes:
        data: float8_e4m3fn or int4, [out.., in..] as the weight in full precision.
        scale: float32 or bfloat16, as stored. fp8: [out..], one for each output channel. int4:
            [out.., in / group], one for each group of neighbors on the last axis.
    """

    data: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight, and what an adapter of rank Q adds to it: second times first.

    Attributes:
        weight: [out.., in..].
        first: [out.., Q, in..], from what is summed over to the rank. Along an axis of `out` whose
            indices all share it, its size is 1.
        second: [out.., Q].
    """

    weight: Any
    first: Any
    second: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def spell(self, axes: str) -> tuple[str, str]:
        """The letters of `first`, its axes of size 1 left out, and of `second`."""
        outs, ins = axes[: self.second.ndim - 1], axes[self.second.ndim - 1 :]
        told = zip(outs, self.first.shape, strict=False)
        apart = "".join(letter for letter, size in told if size > 1)
        return f"{apart}Q{ins}", f"{outs}Q"

    def squeeze(self) -> Array:
        """`first` without its axes of size 1 in `out`."""
        outs = self.second.ndim - 1
        return jnp.squeeze(self.first, tuple(i for i in range(outs) if self.first.shape[i] == 1))


Weight: TypeAlias = Array | Quantized


def dequantize(weight: Weight | Adapted, dtype: Any) -> Array:
    """The weight as an array: data times scale, or what an adapter makes of it, rounded once, to
    `dtype`.
    """
    if isinstance(weight, Adapted):
        axes = "abcdefgh"[: len(weight.shape)]
        first, second = weight.spell(axes)
        added = jnp.einsum(
            f"{second},{first}->{axes}",
            weight.second.astype(jnp.float32),
            weight.squeeze().astype(jnp.float32),
            precision="highest",  # on a GPU float32 would be multiplied as TF32
        )
        return (dequantize(weight.weight, jnp.float32) + added).astype(dtype)
    if not isinstance(weight, Quantized):
        return weight.astype(dtype)
    data, scale = (part.astype(jnp.float32) for part in (weight.data, weight.scale))
    if weight.data.dtype == FP8:
        return (data * scale.reshape(*scale.shape, *[1] * (data.ndim - scale.ndim))).astype(dtype)
    grouped = data.reshape(*scale.shape, -1) * scale[..., None]
    return grouped.reshape(data.shape).astype(dtype)


def multiply(subscripts: str, x: Array, weight: Weight | Adapted) -> Array:
    """`einsum` of x with a weight of any format, in the dtype of x.

    fp8 weights meet fp8 activations: each token of x is divided by its largest element / 448 and
    rounded to e4m3, and the product is scaled back. int4 weights are widened to x's dtype. What an
    adapter adds is computed beside the weight, through its rank.
    """
    if isinstance(weight, Adapted):
        ins, out = subscripts.split("->")
        x_axes, w_axes = ins.split(",")
        first, second = weight.spell(w_axes)
        kept = "".join(letter for letter in x_axes if letter in out)
        inside = kept + "".join(c for c in first if c in second and c not in kept)
        y = jnp.einsum(f"{x_axes},{first}->{inside}", x, weight.squeeze())
        added = jnp.einsum(f"{inside},{second}->{out}", y, weight.second)
        return multiply(subscripts, x, weight.weight) + added
    if not isinstance(weight, Quantized):
        return jnp.einsum(subscripts, x, weight)
    if weight.data.dtype != FP8:
        return jnp.einsum(subscripts, x, dequantize(weight, x.dtype))
    ins, out = subscripts.split("->")
    x_axes, w_axes = ins.split(",")
    summed = tuple(at for at, letter in enumerate(x_axes) if letter not in out)
    rounded, x_scale = quantize_tokens(x, summed)
    # e4m3 is exact in bfloat16 and float32 alike, and so is a product of two in float32.
    wide = x.dtype
    product = jnp.einsum(
        subscripts,
        rounded.astype(wide),
        weight.data.astype(wide),
        preferred_element_type=jnp.float32,
    )
    x_left = "".join(letter for letter in x_axes if letter in out)
    w_left, w_scale = w_axes[: weight.scale.ndim], weight.scale.astype(jnp.float32)
    scaled = jnp.einsum(f"{out},{x_left},{w_left}->{out}", product, x_scale, w_scale)
    return scaled.astype(x.dtype)


def quantize_tokens(x: Array, summed: tuple[int, ...]) -> tuple[Array, Array]:
    """Round x to e4m3 with a scale for each token, over the axes that a product sums over.

    Returns:
        x / scale as float8_e4m3fn, and the float32 scales, without those axes. A token of zeros
        has the scale 1.
    """
    x32 = x.astype(jnp.float32)
    largest = jnp.abs(x32).max(axis=summed, keepdims=True)
    scale = jnp.where(largest > 0, largest / FP8_MAX, 1.0)
    return saturating_cast(x32 / scale, FP8), jnp.squeeze(scale, summed)


def find_factor(largest: Any) -> Any:
    """The scale of a token with this largest element, where it is divided once and not for each
    element: none may be too small for its reciprocal."""
    scale = jnp.maximum(largest * (1 / FP8_MAX), jnp.finfo(jnp.float32).tiny)
    return jnp.where(largest > 0, scale, 1.0)


def saturating_cast(x: Array, dtype: Any) -> Array:
    """x in another dtype; what e4m3 cannot hold becomes its largest: a plain cast gives nan."""
    if dtype == FP8:
        x = jnp.clip(x, -FP8_MAX, FP8_MAX)
    return x.astype(dtype)


@functools.partial(jax.jit, static_argnames=("inner", "scale_dtype"))
def quantize_fp8(weight: Array, inner: int, scale_dtype: Any = jnp.float32) -> Quantized:
    """Round a weight [out.., in..] to e4m3, with a scale for each output channel: amax / 448.

    Args:
        weight: of any float dtype; what is computed is float32.
        inner: how many of the last axes are `in`.
        scale_dtype: what the scales are rounded to before anything is divided by them, so that
            they can be stored in it. They are float32 in the result.

    Returns:
        float8_e4m3fn [out.., in..] and float32 [out..]; a channel of zeros has the scale 1.
    """
    axes = tuple(range(weight.ndim - inner, weight.ndim))
    wide = weight.astype(jnp.float32)
    scale = _find_scale(jnp.abs(wide).max(axes), FP8_MAX, scale_dtype)
    steps = wide * (1 / scale).reshape(*scale.shape, *[1] * inner)
    return Quantized(jnp.clip(steps, -FP8_MAX, FP8_MAX).astype(FP8), scale)


@functools.partial(jax.jit, static_argnames=("group", "scale_dtype"))
def quantize_int4(weight: Array, group: int, scale_dtype: Any = jnp.float32) -> Quantized:
    """Round a weight [out.., in..] to -7..7, with a scale for each `group` neighbors on the last
    axis: amax / 7.

    Args:
        weight: of any float dtype; what is computed is float32.
        group: a divisor of the last axis.
        scale_dtype: as for `quantize_fp8`.

    Returns:
        int4 [out.., in..] and float32 [out.., in / group]; a group of zeros has the scale 1.
    """
    wide = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, group)
    scale = _find_scale(jnp.abs(wide).max(-1), INT4_MAX, scale_dtype)
    steps = jnp.clip(jnp.round(wide * (1 / scale)[..., None]), -INT4_MAX, INT4_MAX)
    return Quantized(steps.reshape(weight.shape).astype(jnp.int4), scale)


def upcast_scales(tree: Any) -> Any:
    """The same weights, of any formats, with scales in float32: a kernel that wants them so would
    have them widened anew in each step."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized) or leaf.scale.dtype == jnp.float32:
            return leaf
        return Quantized(leaf.data, _widen(leaf.scale))

    return jax.tree.map(widen, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))


@jax.jit
def _widen(x: Array) -> Array:
    return x.astype(jnp.float32)


def _find_scale(largest: Array, top: float, dtype: Any) -> Array:
    """float32 largest / top, rounded to a dtype; 1 where that is too small to divide by."""
    # Times a reciprocal, here and where weights meet their scales: XLA makes that of a division by
    # what is constant or broadcast, and so numpy can do the same.
    scale = (largest * jnp.float32(1 / top)).astype(dtype).astype(jnp.float32)
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


def name_axes(weight: Any, names: tuple[str, ...]) -> Any:
    """The logical names of the axes of a weight and, where it is quantized, of its scales."""
    if not isinstance(weight, Quantized):
        return names
    return Quantized(names, names[: len(weight.scale.shape)])
