"""Online quantization: weights are quantized while a checkpoint is loaded."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.names import count_in_axes
from l4jax.config import INT4_GROUP
from l4jax.kernels.formats import Quantized, quantize_fp8, quantize_int4

FORMATS = ("fp8", "int4")

# Other parameters keep their dtype: the router, whose choices need the most precision, the head,
# the embedding, the norms and the vision tower.
_FEED_FORWARD = re.compile(r"text/layer_\d+/feed_forward/(shared/)?(gate_up|down)")
_ATTENTION = re.compile(r"text/layer_\d+/attention/(qkv|out)")


@dataclasses.dataclass(frozen=True)
class OnlineQuantization:
    """A format for the weights of a model.

    Attributes:
        format: "fp8" or "int4".
        includes_attention: whether the projections of attention are quantized, too.
    """

    format: str
    includes_attention: bool

    @classmethod
    def choose(
        cls, quantization: str | None = None, attention: bool | None = None
    ) -> "OnlineQuantization | None":
        """Make the configuration for a user's settings; None if nothing is to be quantized.

        Args:
            quantization: "fp8", "int4" or None.
            attention: whether to quantize attention; by default fp8 does, and int4 does not, as in
                the published checkpoints.

        Raises:
            CheckpointError: the format is unknown, or `attention` is set without a format.
        """
        if quantization is None:
            if attention is not None:
                raise CheckpointError(
                    f"quantize_attention is {attention} and nothing is quantized: "
                    f"choose a quantization, {' or '.join(FORMATS)}, or leave it out."
                )
            return None
        check_format(quantization)
        return cls(quantization, quantization == "fp8" if attention is None else attention)

    def count_in_axes(self, path: str) -> int | None:
        """Count the last axes of a parameter that are inputs; None if it is not quantized."""
        is_attention = self.includes_attention and _ATTENTION.fullmatch(path)
        return count_in_axes(path) if _FEED_FORWARD.fullmatch(path) or is_attention else None

    def quantize(
        self,
        array: jax.Array,
        in_axes: int,
        names: tuple[str, ...],
        place: Callable[[tuple[str, ...]], Sharding],
        permutation: tuple[int, ...] | None = None,
    ) -> Quantized:
        """Quantize a parameter on its devices, and delete it.

        Args:
            array: the parameter; deleted.
            in_axes: the number of its last axes that are inputs.
            names: the logical names of its axes.
            place: logical names of axes -> sharding.
            permutation: transposes the array to the parameter first, within the same program, so
                that the transposed array is never stored.
        """
        permutation = permutation or tuple(range(array.ndim))
        shape = tuple(array.shape[axis] for axis in permutation)
        sharding = place(names)
        if self.format == "fp8":
            size, scale_names = in_axes, names[: len(names) - in_axes]
        else:
            # Groups end at the devices' boundaries, so that each device computes its own scales.
            size, scale_names = choose_group_size(sharding.shard_shape(shape)[-1]), names
        shardings = Quantized(sharding, place(scale_names))
        quantize = _compile_quantize(self.format, size, permutation, shardings)
        quantized = jax.block_until_ready(quantize(array))
        array.delete()
        return quantized


def check_format(quantization: str) -> None:
    """Refuse a format to which weights cannot be quantized."""
    if quantization not in FORMATS:
        raise CheckpointError(
            f"quantization is {quantization!r}: weights are quantized to {' or '.join(FORMATS)}."
        )


def choose_group_size(columns: int) -> int:
    """Choose the largest group size, up to 128, that divides the columns of a device."""
    return next(size for size in range(min(INT4_GROUP, columns), 0, -1) if columns % size == 0)


@functools.cache
def _compile_quantize(
    format: str, size: int, permutation: tuple[int, ...], shardings: Quantized
) -> Callable[[jax.Array], Quantized]:
    """Compile the program that transposes and quantizes.

    Args:
        size: the number of `in` axes for fp8, the group size for int4.
    """

    def run(array: jax.Array) -> Any:
        weight = jnp.transpose(array, permutation)
        return quantize_fp8(weight, size) if format == "fp8" else quantize_int4(weight, size)

    return jax.jit(run, out_shardings=shardings)
