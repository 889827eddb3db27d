"""Calibration of an fp8 cache's scales, for checkpoints without scales, on fixed prompts.

The prompts are always the same: `TOKENS` random ids of the whole vocabulary, in prompts that begin
with the beginning-of-sequence id and are no longer than an attention chunk. So the scales depend on
the model only, not on the first requests. Keys are measured as they are cached: after RoPE and
norm.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from l4jax import cache, decode
from l4jax.config import Config
from l4jax.kernels.formats import FP8_MAX
from l4jax.model import Llama4, Parameters

TOKENS = 512  # of all prompts together
# Other texts, and images, may have larger keys and values than these prompts: half of e4m3's range
# is reserved for them. It costs no precision: e4m3's steps are relative over a range of 2 ** 14,
# and uniform below.
RESERVE = 2.0


def make_batch(config: Config, page: int, shards: int) -> cache.Batch:
    """Make the prompts, each a row with its own pages in each group; the same on each data shard.

    Page ids ascend group by group, so that a group's pages are adjacent: see `find_largest`.

    Args:
        config: of the model.
        page: positions of a page.
        shards: data shards.
    """
    length = min(config.text.chunk, TOKENS)
    rows, width, groups = TOKENS // length, -(-length // page), config.text.nope_interval
    # numpy guarantees that the numbers of RandomState never change.
    token_RS = np.random.RandomState(0).randint(0, config.text.vocab, (rows, length))
    if config.bos_id is not None:
        token_RS[:, 0] = config.bos_id
    table_GRB = np.arange(groups * rows * width, dtype=np.int32).reshape(groups, rows, width)
    table_GRB = np.tile(table_GRB, (1, shards, 1))
    return cache.Batch(
        token_T=np.tile(token_RS.astype(np.int32).ravel(), shards),
        position_T=np.tile(np.arange(length, dtype=np.int32), rows * shards),
        row_T=np.tile(np.repeat(np.arange(rows, dtype=np.int32), length), shards),
        tables=cache.PageTables(global_RB=table_GRB[-1], local_GRB=table_GRB[:-1]),
    )


@functools.partial(jax.jit, static_argnames=("model", "page", "shards", "stripes", "dtype"))
def find_largest(
    params: Parameters,
    batch: cache.Batch,
    *,
    model: Llama4,
    page: int,
    shards: int,
    stripes: int = 1,
    dtype: Any,
) -> tuple[Array, Array]:
    """Return the largest key and the largest value of each layer, two of [layers] float32.

    The values are read from a temporary cache in full precision.

    Args:
        params: the tree of `declare_parameters`.
        batch: of `make_batch`.
        model, page, shards, stripes, dtype: static; dtype is that of keys and values.
    """
    text = model.config
    pages = batch.tables.global_RB.size * text.nope_interval * stripes
    pool = cache.make_pool(text, pages, page, dtype)
    _, pool = decode.bind(model, params)(batch, pool)

    def reduce(arrays: tuple[Array, ...]) -> Array:
        # An array has one repetition of the pattern: [shards * stripes, groups, ..]; unwritten
        # pages are 0.
        grouped = [x.reshape(shards * stripes, text.nope_interval, -1) for x in arrays]
        largest = jnp.concatenate([jnp.abs(x).max((0, 2)) for x in grouped])
        return largest[: text.layers].astype(jnp.float32)

    return reduce(pool.k), reduce(pool.v)


def choose_scales(largest_L: np.ndarray) -> np.ndarray:
    """Return the least powers of two that are at least amax * RESERVE / 448; 1 for amax 0.

    A power of two changes no mantissa bit: any other factor would round keys, queries and values
    once more in bfloat16.
    """
    least_L = np.asarray(largest_L, np.float32) * np.float32(RESERVE / FP8_MAX)
    mantissa_L, exponent_L = np.frexp(least_L)  # mantissas from 1/2, a power of two itself, to 1
    scale_L = np.ldexp(np.float32(1), exponent_L - (mantissa_L == 0.5))
    return np.where(least_L > 0, scale_L, np.float32(1))
