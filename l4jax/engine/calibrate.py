"""Scales of an fp8 cache, for a checkpoint that has none: found by running fixed prompts once.

What is run is always the same: `TOKENS` ids drawn from the whole vocabulary, in prompts that begin
as every prompt does and are no longer than an attention chunk. So the scales depend on the model
alone, and not on who asks first. Keys are taken as they are cached: after RoPE and the norm.
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
# Other texts, and images, may reach further than these prompts: half of e4m3's range is left for
# them. It costs no precision, whose steps are relative over 2 ** 14, and then even.
RESERVE = 2.0


def make_batch(config: Config, page: int, shards: int) -> cache.Batch:
    """The prompts, each a row with pages of its own in each group: the same on each data shard.

    Page ids go up group by group, so that a group's pages lie together: see `find_largest`.

    Args:
        config: of the model.
        page: positions of a page.
        shards: data shards.
    """
    length = min(config.text.chunk, TOKENS)
    rows, width, groups = TOKENS // length, -(-length // page), config.text.nope_interval
    # RandomState: numpy promises that its numbers never change.
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


@functools.partial(jax.jit, static_argnames=("model", "page", "shards", "dtype"))
def find_largest(
    params: Parameters, batch: cache.Batch, *, model: Llama4, page: int, shards: int, dtype: Any
) -> tuple[Array, Array]:
    """The largest key and the largest value of each layer, two of [layers] float32.

    The cache is there for this call alone, in full precision, and its layers are read off it.

    Args:
        params: the tree of `declare_parameters`.
        batch: of `make_batch`.
        model, page, shards, dtype: static; the dtype is that of keys and values.
    """
    text = model.config
    pool = cache.make_pool(text, batch.tables.global_RB.size * text.nope_interval, page, dtype)
    _, pool = decode.forward(model, params, pool, batch)

    def reduce(arrays: tuple[Array, ...]) -> Array:
        # Of each repetition of the pattern: [shards, groups, ..]; what nobody wrote to is 0.
        grouped = [x.reshape(shards, text.nope_interval, -1) for x in arrays]
        largest = jnp.concatenate([jnp.abs(x).max((0, 2)) for x in grouped])
        return largest[: text.layers].astype(jnp.float32)

    return reduce(pool.k), reduce(pool.v)


def choose_scales(largest_L: np.ndarray) -> np.ndarray:
    """The least powers of two that leave the reserve: no less than amax * RESERVE / 448; 1 for 0.

    With a power of two no bit changes but for what it is there for: in bfloat16 keys, queries and
    values would be rounded once more by any other factor.
    """
    wanted_L = np.asarray(largest_L, np.float32) * np.float32(RESERVE / FP8_MAX)
    part_L, exponent_L = np.frexp(wanted_L)  # of 1/2, which is a power itself, up to 1
    scale_L = np.ldexp(np.float32(1), exponent_L - (part_L == 0.5))
    return np.where(wanted_L > 0, scale_L, np.float32(1))
