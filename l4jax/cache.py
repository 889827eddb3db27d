"""The paged KV cache: the pool, its page tables, and the batch of a step, as pytrees.

Llama 4 repeats a pattern of `nope_interval` layers (four: three chunk-local, one global). Group g
has the layers i with `i % 4 == g`, and the keys and values of layers 4j .. 4j+3 share array j of
the pool, so a page id means the same in every array. A request owns pages of the global group over
its whole length, and pages of each local group only over its current attention chunk; the engine
releases local pages at the chunk's end. So no memory is split between kinds of layers in advance.

A batch consists of rows: a row is consecutive tokens of one request inside one chunk. A local layer
therefore needs only the position within the chunk, for RoPE, for its page table and for its mask. A
prompt that crosses a chunk boundary within one step is two rows with the same global pages.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from l4jax import axes
from l4jax.config import TextConfig

# The leaves of one tree type differ: numpy arrays that the engine fills, arrays or tracers in a
# step, logical axis names or shardings that place them.
Leaf: TypeAlias = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """Keys and values, preallocated: `k[j]` and `v[j]` are [pages, kv_heads, page, head_dim].

    Array j is shared by the layers of one repetition of the pattern. Donate the pool, and use the
    one that is returned.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    # float32 [layers]: factors of stored keys and values, if the pages are fp8.
    k_scale: Array | None = None
    v_scale: Array | None = None

    def find_scales(self, layer: int) -> tuple[Array, Array] | None:
        """Return the scales of a layer's keys and values; None if they are stored unscaled."""
        if self.k_scale is None or self.v_scale is None:
            return None
        return self.k_scale[layer], self.v_scale[layer]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTables:
    """The pages of each row. Entries beyond a row's length are never read; write 0 there.

    Ids and rows count within a data shard: a step never reads another shard's pages.
    """

    global_RB: Leaf  # int32: page of positions b * page .. of the request, for the global layers
    local_GRB: Leaf  # int32: the same within the row's chunk, one table per local group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of a step: rows in ascending order, each row's tokens consecutive.

    A token with position -1 is padding: it writes nothing, and its outputs are not used.
    """

    token_T: Leaf  # int32; in a batch for `decode`, -1 - s is the last sampled token of slot s
    position_T: Leaf  # int32, counted from the start of the request
    row_T: Leaf  # int32, within the data shard
    tables: PageTables
    feature_T: Leaf = None  # int32 index into the image features, -1 for text; None without images


POOL_AXES = (axes.PAGES, axes.KV_HEADS, axes.PAGE, axes.HEAD_DIM)


def name_pool_axes(pool: PagePool) -> PagePool:
    """Return the logical axis names of a pool; every device has all scales."""
    scales = None if pool.k_scale is None else (axes.LAYERS,)
    names = tuple(POOL_AXES for _ in pool.k)
    return PagePool(names, names, scales, scales)  # type: ignore[arg-type]


def name_axes(*, has_features: bool = False) -> Batch:
    """Return the logical axis names of a batch."""
    tokens = (axes.TOKENS,)
    tables = PageTables((axes.ROWS, axes.TABLE), (axes.GROUPS, axes.ROWS, axes.TABLE))
    return Batch(tokens, tokens, tokens, tables, tokens if has_features else None)


def count_arrays(config: TextConfig) -> int:
    """Count the arrays of the pool: repetitions of the pattern, the last one perhaps incomplete."""
    return -(-config.layers // config.nope_interval)


def count_page_bytes(config: TextConfig, page: int, dtype: jnp.dtype) -> int:
    """Count the bytes of one page id, over all arrays, keys and values."""
    slots = 2 * count_arrays(config) * config.kv_heads * page
    return slots * config.head_dim * jnp.dtype(dtype).itemsize


def make_pool(config: TextConfig, pages: int, page: int, dtype: jnp.dtype) -> PagePool:
    """Make a pool of zeros: `pages` pages of `page` positions. Trace it under jit to place it."""
    shape = (pages, config.kv_heads, page, config.head_dim)
    arrays = range(count_arrays(config))
    has_scales = jnp.dtype(dtype).itemsize == 1
    return PagePool(
        k=tuple(jnp.zeros(shape, dtype) for _ in arrays),
        v=tuple(jnp.zeros(shape, dtype) for _ in arrays),
        k_scale=jnp.ones(config.layers, jnp.float32) if has_scales else None,
        v_scale=jnp.ones(config.layers, jnp.float32) if has_scales else None,
    )
