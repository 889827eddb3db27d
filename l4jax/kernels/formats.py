"""Weight formats: a plain array, fp8 or int4 data with scales, or one of these with a LoRA adapter.

Every format ends in the contracted axes, so a weight and its scales shard alike.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3fn
# The range is -7..7 and not -8..7: with a scale of amax / 7 the largest element of a group is exact
# whatever its sign, and no element is off by more than half a step. With amax / 7.5 a positive
# largest element would saturate, half a step wrong each time.
INT4_MAX = 7.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized weight. The dtype of its data determines the format.

    Attributes:
        data: float8_e4m3fn or int4, [out.., in..], like the weight in full precision.
        scale: float32 or bfloat16, as stored. fp8: [out..], one per output channel. int4:
            [out.., in / group], one per group of neighbors on the last axis.
    """

    data: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight and a LoRA adapter of rank Q, which adds `second @ first`.

    Attributes:
        weight: [out.., in..].
        first: [out.., Q, in..], the down projection to the rank. An axis of `out` has size 1 where
            all its indices share the factor.
        second: [out.., Q], the up projection from the rank.
    """

    weight: Any
    first: Any
    second: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def format_subscripts(self, axes: str) -> tuple[str, str]:
        """Return einsum letters of `first`, without its axes of size 1, and of `second`."""
        outs, ins = axes[: self.second.ndim - 1], axes[self.second.ndim - 1 :]
        sizes = zip(outs, self.first.shape, strict=False)
        kept = "".join(letter for letter, size in sizes if size > 1)
        return f"{kept}Q{ins}", f"{outs}Q"

    def squeeze(self) -> Array:
        """Drop the axes of size 1 in `out` from `first`."""
        outs = self.second.ndim - 1
        return jnp.squeeze(self.first, tuple(i for i in range(outs) if self.first.shape[i] == 1))


Weight: TypeAlias = Array | Quantized


def dequantize(weight: Weight | Adapted, dtype: Any) -> Array:
    """Return a weight as a plain array: data times scale, plus the adapter's product.

    The sum is float32 and is rounded to `dtype` once.
    """
    if isinstance(weight, Adapted):
        axes = "abcdefgh"[: len(weight.shape)]
        first, second = weight.format_subscripts(axes)
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
    """Compute the `einsum` of x with a weight of any format, in the dtype of x.

    fp8: each token of x is divided by its amax / 448 and rounded to e4m3; both scales multiply the
    product. int4: the weight is dequantized to the dtype of x. An adapter's term is computed
    through its rank and added.
    """
    if isinstance(weight, Adapted):
        ins, out = subscripts.split("->")
        x_axes, w_axes = ins.split(",")
        first, second = weight.format_subscripts(w_axes)
        kept = "".join(letter for letter in x_axes if letter in out)
        inner = kept + "".join(c for c in first if c in second and c not in kept)
        y = jnp.einsum(f"{x_axes},{first}->{inner}", x, weight.squeeze())
        added = jnp.einsum(f"{inner},{second}->{out}", y, weight.second)
        return multiply(subscripts, x, weight.weight) + added
    if not isinstance(weight, Quantized):
        return jnp.einsum(subscripts, x, weight)
    if weight.data.dtype != FP8:
        return jnp.einsum(subscripts, x, dequantize(weight, x.dtype))
    ins, out = subscripts.split("->")
    x_axes, w_axes = ins.split(",")
    summed = tuple(at for at, letter in enumerate(x_axes) if letter not in out)
    rounded, x_scale = quantize_tokens(x, summed)
    # bfloat16 and float32 hold every e4m3 value exactly, and float32 every product of two.
    product = jnp.einsum(
        subscripts,
        rounded.astype(x.dtype),
        weight.data.astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    x_left = "".join(letter for letter in x_axes if letter in out)
    w_left, w_scale = w_axes[: weight.scale.ndim], weight.scale.astype(jnp.float32)
    scaled = jnp.einsum(f"{out},{x_left},{w_left}->{out}", product, x_scale, w_scale)
    return scaled.astype(x.dtype)


def quantize_tokens(x: Array, summed: tuple[int, ...]) -> tuple[Array, Array]:
    """Quantize x to e4m3 with one scale per token.

    Args:
        x: activations.
        summed: the contracted axes, over which a scale is shared.

    Returns:
        x / scale as float8_e4m3fn, and the float32 scales without the contracted axes. A token of
        zeros has the scale 1.
    """
    x32 = x.astype(jnp.float32)
    amax = jnp.abs(x32).max(axis=summed, keepdims=True)
    scale = jnp.where(amax > 0, amax / FP8_MAX, 1.0)
    return saturating_cast(x32 / scale, FP8), jnp.squeeze(scale, summed)


def compute_fp8_scale(amax: Any) -> Any:
    """Compute the fp8 scale of a token from its amax, for kernels that multiply by the reciprocal.

    The reciprocal stays finite: no scale is below float32's smallest normal number.
    """
    scale = jnp.maximum(amax * (1 / FP8_MAX), jnp.finfo(jnp.float32).tiny)
    return jnp.where(amax > 0, scale, 1.0)


def saturating_cast(x: Array, dtype: Any) -> Array:
    """Cast x; values beyond the range of e4m3 saturate, where a plain cast gives nan."""
    if dtype == FP8:
        x = jnp.clip(x, -FP8_MAX, FP8_MAX)
    return x.astype(dtype)


@functools.partial(jax.jit, static_argnames=("inner", "scale_dtype"))
def quantize_fp8(weight: Array, inner: int, scale_dtype: Any = jnp.float32) -> Quantized:
    """Quantize a weight [out.., in..] to e4m3, with one scale per output channel: amax / 448.

    Args:
        weight: any float dtype; the arithmetic is float32.
        inner: number of trailing axes that are `in`.
        scale_dtype: scales are rounded to this dtype before the division, so that a checkpoint can
            store them in it. They are float32 in the result.

    Returns:
        float8_e4m3fn [out.., in..] and float32 [out..]; a channel of zeros has the scale 1.
    """
    axes = tuple(range(weight.ndim - inner, weight.ndim))
    weight32 = weight.astype(jnp.float32)
    scale = _compute_scale(jnp.abs(weight32).max(axes), FP8_MAX, scale_dtype)
    steps = weight32 * (1 / scale).reshape(*scale.shape, *[1] * inner)
    return Quantized(jnp.clip(steps, -FP8_MAX, FP8_MAX).astype(FP8), scale)


@functools.partial(jax.jit, static_argnames=("group", "scale_dtype"))
def quantize_int4(weight: Array, group: int, scale_dtype: Any = jnp.float32) -> Quantized:
    """Quantize a weight [out.., in..] to -7..7, with one scale per group: amax / 7.

    Args:
        weight: any float dtype; the arithmetic is float32.
        group: neighbors on the last axis that share a scale; divides that axis.
        scale_dtype: as for `quantize_fp8`.

    Returns:
        int4 [out.., in..] and float32 [out.., in / group]; a group of zeros has the scale 1.
    """
    grouped = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, group)
    scale = _compute_scale(jnp.abs(grouped).max(-1), INT4_MAX, scale_dtype)
    steps = jnp.clip(jnp.round(grouped * (1 / scale)[..., None]), -INT4_MAX, INT4_MAX)
    return Quantized(steps.reshape(weight.shape).astype(jnp.int4), scale)


def upcast_scales(tree: Any) -> Any:
    """Cast the scales of all quantized weights in a tree to float32, once.

    Kernels that read float32 scales would otherwise cast them in every step.
    """

    def upcast(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized) or leaf.scale.dtype == jnp.float32:
            return leaf
        return Quantized(leaf.data, _cast_to_float32(leaf.scale))

    return jax.tree.map(upcast, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))


@jax.jit
def _cast_to_float32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _compute_scale(amax: Array, dtype_max: float, dtype: Any) -> Array:
    """Compute amax / dtype_max in float32, rounded to a dtype; 1 where it is subnormal."""
    # Multiply by the reciprocal, here and where weights are divided by their scales: XLA rewrites a
    # division by a constant or a broadcast value so, and numpy can reproduce the result.
    scale = (amax * jnp.float32(1 / dtype_max)).astype(dtype).astype(jnp.float32)
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


def name_axes(weight: Any, names: tuple[str, ...]) -> Any:
    """Return the logical axis names of a weight and, where it is quantized, of its scales."""
    if not isinstance(weight, Quantized):
        return names
    return Quantized(names, names[: len(weight.scale.shape)])
