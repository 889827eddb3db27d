"""Wide weights made narrow as they are loaded: which ones, in which format, on which devices."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from l4jax.checkpoint.errors import CheckpointError
from l4jax.kernels.formats import Quantized, quantize_fp8, quantize_int4

FORMATS = ("fp8", "int4")
GROUP = 128  # neighbors that share a scale of int4, at most: as in the published checkpoints

# How many of the last axes are summed over. What does not stand here stays as it is: the router,
# whose choice is the finest of all, the head, the embedding, the norms and all of vision.
_FEED_FORWARD: Mapping[str, int] = {
    "text/layer_*/feed_forward/gate_up": 1,
    "text/layer_*/feed_forward/down": 1,
    "text/layer_*/feed_forward/shared/gate_up": 1,
    "text/layer_*/feed_forward/shared/down": 1,
}
_ATTENTION: Mapping[str, int] = {
    "text/layer_*/attention/qkv": 1,
    "text/layer_*/attention/out": 3,
}


@dataclasses.dataclass(frozen=True)
class OnlineQuantization:
    """A format for the weights of a model.

    Attributes:
        format: "fp8" or "int4".
        attention: whether the projections of attention get it, too.
    """

    format: str
    attention: bool

    @classmethod
    def choose(
        cls, quantization: str | None = None, attention: bool | None = None
    ) -> "OnlineQuantization | None":
        """What users ask for; by default int4 leaves attention alone, as the published ones do.

        Raises `CheckpointError` for a format that there is not.
        """
        if quantization is None:
            if attention is not None:
                raise CheckpointError(
                    f"quantize_attention is {attention} and nothing is quantized: "
                    f"choose a quantization, {' or '.join(FORMATS)}, or leave it out."
                )
            return None
        if quantization not in FORMATS:
            raise CheckpointError(
                f"quantization is {quantization!r}: weights are made {' or '.join(FORMATS)}."
            )
        return cls(quantization, quantization == "fp8" if attention is None else attention)

    def count_inner(self, path: str) -> int | None:
        """How many of a parameter's last axes are summed over; None if it stays as it is."""
        pattern = re.sub(r"/layer_\d+/", "/layer_*/", path)
        return _FEED_FORWARD.get(pattern, _ATTENTION.get(pattern) if self.attention else None)

    def quantize(
        self,
        array: jax.Array,
        inner: int,
        names: tuple[str, ...],
        place: Callable[[tuple[str, ...]], Sharding],
        order: tuple[int, ...] | None = None,
    ) -> Quantized:
        """Quantize a parameter where it lies, and free it.

        Args:
            array: the parameter; deleted.
            inner: how many of its last axes are summed over.
            names: of its axes.
            place: the sharding of an array whose axes have these logical names.
            order: by which the array is first transposed to the parameter, if at all: in the same
                program, so that the transposed one never is.
        """
        order = order or tuple(range(array.ndim))
        shape = tuple(array.shape[axis] for axis in order)
        sharding = place(names)
        if self.format == "fp8":
            size, scale_names = inner, names[: len(names) - inner]
        else:
            # Each device has whole groups: none needs a scale that another one finds.
            size, scale_names = find_group(sharding.shard_shape(shape)[-1]), names
        places = Quantized(sharding, place(scale_names))
        quantized = jax.block_until_ready(_make(self.format, size, order, places)(array))
        array.delete()
        return quantized


def find_group(columns: int) -> int:
    """The largest group of neighbors, up to 128, that divides the columns of a device."""
    return next(size for size in range(min(GROUP, columns), 0, -1) if columns % size == 0)


@functools.cache
def _make(
    form: str, size: int, order: tuple[int, ...], places: Quantized
) -> Callable[[jax.Array], Quantized]:
    def run(array: jax.Array) -> Any:
        weight = jnp.transpose(array, order)
        return quantize_fp8(weight, size) if form == "fp8" else quantize_int4(weight, size)

    return jax.jit(run, out_shardings=places)
