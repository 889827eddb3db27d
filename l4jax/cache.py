"""The page pool, its tables, and the tokens of a step: pytrees that the caller owns.

Llama 4 repeats a pattern of `nope_interval` layers (four: three chunk-local, one global). Group g
holds the layers i with `i % 4 == g`, and the keys and values of layers 4j .. 4j+3 share array j of
the pool, so a page id means the same in every array. A request owns pages for its global group over
its whole length, and for each local group only over its current chunk; the engine gives those back
at the chunk's end. Nobody has to guess a split of memory between kinds of layers.

The step sees rows: a row is a run of tokens of one request inside one chunk. A local layer
therefore needs nothing but the position within the chunk, for RoPE, for its table and for its mask;
a prompt that crosses a boundary within one step is two rows with the same global pages.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from l4jax import axes
from l4jax.config import TextConfig

# One tree has many leaves: numpy where the engine fills it, arrays or tracers in a step, the names
# of an array's axes where it says how to place them.
Leaf: TypeAlias = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """Keys and values, preallocated: `k[j]` and `v[j]` are [pages, kv_heads, page, head_dim].

    Array j is shared by the layers of one repetition of the pattern. Donate it and use what comes
    back.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    # float32 [layers]: what stored keys and values are multiplied by, where the pages are fp8.
    k_scale: Array | None = None
    v_scale: Array | None = None

    def find_scales(self, layer: int) -> tuple[Array, Array] | None:
        """The scales of a layer's keys and values; None where pages hold them as they are."""
        if self.k_scale is None or self.v_scale is None:
            return None
        return self.k_scale[layer], self.v_scale[layer]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTables:
    """The pages of each row. Entries beyond a row's length are never seen; write 0 there.

    Ids and rows count within a data shard: a sharded step never looks at its neighbor's pages.
    """

    global_RB: Leaf  # int32: page of positions b * page .. of the request, for the global layers
    local_GRB: Leaf  # int32: the same within the row's chunk, one table for each local group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of a step, rows in ascending order and each row's tokens in a run.

    A token with position -1 is padding: it writes nothing and nothing of it is used.
    """

    token_T: Leaf  # int32; in a batch for `decode`, -1 - s is the token drawn last in slot s
    position_T: Leaf  # int32, counted from the start of the request
    row_T: Leaf  # int32, within the data shard
    tables: PageTables
    feature_T: Leaf = None  # int32 index into the image features, -1 for text; None without images


POOL_AXES = (axes.PAGES, axes.KV_HEADS, axes.PAGE, axes.HEAD_DIM)


def name_pool_axes(pool: PagePool) -> PagePool:
    """The logical names of the axes of a pool; every device has all scales."""
    scales = None if pool.k_scale is None else (axes.LAYERS,)
    names = tuple(POOL_AXES for _ in pool.k)
    return PagePool(names, names, scales, scales)  # type: ignore[arg-type]


def name_axes(*, has_features: bool = False) -> Batch:
    """The logical names of the axes of a batch."""
    tokens = (axes.TOKENS,)
    tables = PageTables((axes.ROWS, axes.TABLE), (axes.GROUPS, axes.ROWS, axes.TABLE))
    return Batch(tokens, tokens, tokens, tables, tokens if has_features else None)


def count_arrays(config: TextConfig) -> int:
    """Arrays in the pool: repetitions of the pattern, the last one perhaps not complete."""
    return -(-config.layers // config.nope_interval)


def count_page_bytes(config: TextConfig, page: int, dtype: jnp.dtype) -> int:
    """Bytes that one page id stands for, over all arrays, keys and values."""
    slots = 2 * count_arrays(config) * config.kv_heads * page
    return slots * config.head_dim * jnp.dtype(dtype).itemsize


def make_pool(config: TextConfig, pages: int, page: int, dtype: jnp.dtype) -> PagePool:
    """A pool of zeros: `pages` pages of `page` positions. Trace it under jit to place it."""
    shape = (pages, config.kv_heads, page, config.head_dim)
    arrays = range(count_arrays(config))
    has_scales = jnp.dtype(dtype).itemsize == 1
    return PagePool(
        k=tuple(jnp.zeros(shape, dtype) for _ in arrays),
        v=tuple(jnp.zeros(shape, dtype) for _ in arrays),
        k_scale=jnp.ones(config.layers, jnp.float32) if has_scales else None,
        v_scale=jnp.ones(config.layers, jnp.float32) if has_scales else None,
    )
