"""The model's weights on the devices: loaded from a checkpoint, or random."""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import checkpoint
from l4jax.config import Config
from l4jax.kernels.formats import upcast_scales
from l4jax.model import Parameters, declare_parameters

Place = Callable[[tuple[str, ...]], Any]  # from logical axis names to a sharding


def load_params(
    folder: Path,
    config: Config,
    dtype: jnp.dtype,
    place: Place,
    *,
    quantization: str | None = None,
    quantize_attention: bool | None = None,
    lora: Path | None = None,
    upcasts_scales: bool = False,
    progress: bool = True,
) -> Parameters:
    """Load the weights, each device its own shard.

    Args:
        folder: of the checkpoint.
        config: of the model.
        dtype: of weights that are not quantized.
        place: returns the sharding of an array with these logical axis names.
        quantization: "fp8" or "int4" quantizes while loading.
        quantize_attention: also quantize attention; None is True for fp8 and False for int4.
        lora: the folder of an adapter in PEFT's layout, merged before the weights are quantized.
        upcasts_scales: convert scales to float32 once, for kernels that read them so.
        progress: show a progress bar.
    """
    params = checkpoint.load(
        folder,
        config,
        dtype,
        place,
        online_quantization=checkpoint.OnlineQuantization.choose(quantization, quantize_attention),
        lora=checkpoint.read_adapter(lora, config) if lora else None,
        progress=progress,
    )
    return upcast_scales(params) if upcasts_scales else params


def initialize_params(
    seed: int,
    config: Config,
    dtype: jnp.dtype,
    place: Place,
    *,
    quantization: str | None = None,
    quantize_attention: bool | None = None,
) -> Parameters:
    """Make random weights on the devices, quantized as in `load_params`."""
    online_quantization = checkpoint.OnlineQuantization.choose(quantization, quantize_attention)
    shapes, names = declare_parameters(config, dtype)

    # One program per shape: a single program with a hundred generators took minutes to compile.
    @functools.partial(jax.jit, static_argnames=("shape", "sharding"))
    def draw(salt: Any, shape: tuple[int, ...], sharding: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), salt)
        values = 0.02 * jax.random.normal(key, shape, dtype)
        return jax.lax.with_sharding_constraint(values, sharding)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> Any:
        salt = np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
        array = draw(salt, leaf.shape, place(names))
        in_axes = online_quantization and online_quantization.count_in_axes(
            "/".join(key.key for key in path)
        )
        if not online_quantization or not in_axes:
            return array
        return online_quantization.quantize(array, in_axes, names, place)

    return jax.tree_util.tree_map_with_path(fill, shapes, names)
