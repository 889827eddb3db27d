"""Allocation of the state on the devices: the KV cache, the decode state and image features."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import axes, cache, decode
from l4jax.config import Config
from l4jax.engine import calibrate
from l4jax.engine.capacity import count_pool_bytes, count_temporary_bytes
from l4jax.engine.config import EngineConfig
from l4jax.engine.scheduler import Limits
from l4jax.model import Llama4, Parameters
from sharding import Layout, find_gpu_share

CPU_POOL_BYTES = 2**28  # of a stripe of a data shard, without `kv_cache_memory_bytes`

Scales = tuple[np.ndarray, np.ndarray]  # float32 [layers], of keys and of values


@dataclasses.dataclass(frozen=True)
class DeviceState:
    """The arrays that steps read and update on the devices, or the shardings of these arrays.

    Attributes:
        pool: pages of keys and values.
        decode_state: last tokens and token counts, by request slot.
        features: [slots, features, D] of image tiles; None if prompts have no images.
    """

    pool: Any
    decode_state: Any
    features: Any


def measure_pool_bytes(config: Config, engine_config: EngineConfig, layout: Layout) -> int:
    """Return the bytes that one stripe of a data shard's page pool may take, over its devices."""
    if engine_config.kv_cache_memory_bytes is not None:
        return engine_config.kv_cache_memory_bytes // layout.count(axes.STRIPES)
    device = layout.mesh.devices.flat[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return CPU_POOL_BYTES
    rows, tokens = engine_config.divide(layout.count(axes.ROWS))
    pool_bytes = count_pool_bytes(
        engine_config,
        limit=stats["bytes_limit"],
        in_use=stats["bytes_in_use"],
        temporaries=count_temporary_bytes(config.text, rows=rows, tokens=tokens),
        preallocated=find_gpu_share() if device.platform == "gpu" else 1.0,
    )
    return pool_bytes * layout.count(axes.KV_HEADS)


def calibrate_scales(
    config: Config, params: Parameters, model: Llama4, page: int, layout: Layout, dtype: jnp.dtype
) -> Scales:
    """Calibrate the scales of an fp8 cache on fixed prompts. Call it under the layout."""
    shards = layout.count(axes.ROWS)
    batch = calibrate.make_batch(config, page, shards)
    stripes = layout.count(axes.STRIPES)
    largest = calibrate.find_largest(
        params,
        jax.device_put(batch, layout.place_all(cache.name_axes())),
        model=model,
        page=page,
        shards=shards,
        stripes=stripes,
        dtype=dtype,
    )
    k_largest, v_largest = jax.device_get(largest)
    return calibrate.choose_scales(k_largest), calibrate.choose_scales(v_largest)


def allocate_state(
    config: Config,
    limits: Limits,
    layout: Layout,
    *,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
    scales: Scales | None,
) -> tuple[DeviceState, DeviceState]:
    """Allocate an empty state.

    Args:
        config: of the model.
        limits: sizes.
        layout: placement.
        dtype: of image features.
        cache_dtype: of keys and values.
        scales: of an fp8 cache; None is 1.

    Returns:
        The state, and the shardings of its arrays.
    """
    text, vision = config.text, config.vision
    pages = limits.shards * limits.stripes * limits.pages
    make_pool = functools.partial(cache.make_pool, text, pages, limits.page, cache_dtype)
    make_decode_state = functools.partial(
        decode.make_decode_state, limits.shards * limits.requests, text.vocab
    )
    shardings = DeviceState(
        layout.place_all(cache.name_pool_axes(jax.eval_shape(make_pool))),
        layout.place_all(decode.DECODE_STATE_AXES),
        layout.place((axes.TILES, axes.FEATURES, axes.WIDTH)),
    )
    pool = jax.jit(make_pool, out_shardings=shardings.pool)()
    if scales is not None:
        names = ((axes.LAYERS,), (axes.LAYERS,))
        k_scale, v_scale = jax.device_put(scales, layout.place_all(names))
        pool = dataclasses.replace(pool, k_scale=k_scale, v_scale=v_scale)
    decode_state = jax.jit(make_decode_state, out_shardings=shardings.decode_state)()
    features = None
    if limits.feature_slots and vision is not None:
        shape = (limits.feature_slots, vision.features, text.width)
        make_features = functools.partial(jnp.zeros, shape, dtype)
        features = jax.jit(make_features, out_shardings=shardings.features)()
    return DeviceState(pool, decode_state, features), shardings
