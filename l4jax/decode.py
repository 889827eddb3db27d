"""The step, and the device-side loop of many steps: what the engine jits, and nothing else runs on
a device.

Shapes come from a short list of buckets, so that each of these compiles a few times at the start
and never again. The pool is donated: pass it in, use the one that comes out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from l4jax import axes
from l4jax.cache import Batch, Leaf, PagePool, Tables
from l4jax.model import Llama4, Parameters, VisionTower
from l4jax.sampling import Controls, Sampled, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where each row of a decode loop stands. The token has been chosen and not yet been run."""

    token_R: Leaf  # int32
    position_R: Leaf  # int32, of that token; -1 is an unused row
    row_R: Leaf  # int32, the row's own number within its data shard
    limit_R: Leaf  # int32, tokens that the row may still choose in this call
    stop_RL: Leaf  # int32 ids that end the row, filled up with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """The tokens that a decode loop chose, in order; -1 where a row had ended."""

    token_SR: Leaf  # int32
    logprob_SR: Leaf = None
    top_token_SRL: Leaf = None
    top_logprob_SRL: Leaf = None


_ROW = (axes.ROWS,)
ROWS_AXES = Rows(_ROW, _ROW, _ROW, _ROW, (axes.ROWS, axes.LIST))


def forward(
    model: Llama4, params: Parameters, pool: PagePool, batch: Batch, features: Array | None = None
) -> tuple[Array, PagePool]:
    """Hidden states [T, D] of the tokens of a step, and the pool with them in it."""
    if features is not None:
        features = features.reshape(-1, features.shape[-1])
    variables = {"params": params["text"]}
    return model.apply(variables, batch, pool, features)  # type: ignore[return-value]


def find_logits(model: Llama4, params: Parameters, x_RD: Array) -> Array:
    """[R, V] float32 logits of hidden states."""
    return model.apply({"params": params["text"]}, x_RD, method="find_logits")  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnames=("model", "logprobs"), donate_argnames="pool")
def step(
    params: Parameters,
    pool: PagePool,
    batch: Batch,
    last_R: Array,
    controls: Controls,
    features: Array | None = None,
    *,
    model: Llama4,
    logprobs: int | None = None,
) -> tuple[PagePool, Sampled]:
    """Run the tokens of a step and draw a next token for each row.

    Args:
        params: the tree of `declare_parameters`.
        pool: donated.
        batch: prompt chunks and single tokens, in any mix.
        last_R: index, over all tokens of the step, of each row's last token: the one whose logits
            count.
        controls: how each row is sampled.
        features: [slots, features, D] of the images, where the batch points into them.
        model: static.
        logprobs: static; see `sampling.sample`.
    """
    x_TD, pool = forward(model, params, pool, batch, features)
    logits_RV = find_logits(model, params, x_TD[last_R])
    return pool, sample(logits_RV, controls, batch.position_T[last_R] + 1, logprobs)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames="pool")
def score(
    params: Parameters,
    pool: PagePool,
    batch: Batch,
    features: Array | None = None,
    *,
    model: Llama4,
) -> tuple[PagePool, Array]:
    """Run the tokens of a step and return the logits of every one, [T, V] float32."""
    x_TD, pool = forward(model, params, pool, batch, features)
    return pool, find_logits(model, params, x_TD)


@functools.partial(jax.jit, static_argnames=("model", "steps", "logprobs"), donate_argnames="pool")
def decode_loop(
    params: Parameters,
    pool: PagePool,
    rows: Rows,
    tables: Tables,
    controls: Controls,
    *,
    model: Llama4,
    steps: int,
    logprobs: int | None = None,
) -> tuple[PagePool, Decoded]:
    """Decode up to `steps` tokens for each row on the device, and return them at once.

    A row ends at a stop id or at its limit; the loop ends when all rows have. The caller owns
    enough pages in `tables`, and sets limits that no row crosses a chunk boundary with.
    """
    rows_R = rows.token_R.shape

    def record(buffers: Decoded, at: Array, sampled: Sampled, is_running_R: Array) -> Decoded:
        def put(buffer: Array | None, value: Array | None, nothing: float) -> Array | None:
            if buffer is None or value is None:
                return None
            shown = jnp.where(is_running_R.reshape(-1, *[1] * (value.ndim - 1)), value, nothing)
            return buffer.at[at].set(shown.astype(buffer.dtype))

        return Decoded(
            put(buffers.token_SR, sampled.token_R, -1),
            put(buffers.logprob_SR, sampled.logprob_R, 0),
            put(buffers.top_token_SRL, sampled.top_token_RL, -1),
            put(buffers.top_logprob_SRL, sampled.top_logprob_RL, 0),
        )

    def is_going(carry: Any) -> Array:
        at, _, _, is_running_R, _, _ = carry
        return (at < steps) & is_running_R.any()

    def advance(carry: Any) -> Any:
        at, token_R, position_R, is_running_R, pool, buffers = carry
        batch = Batch(token_R, jnp.where(is_running_R, position_R, -1), rows.row_R, tables)
        x_RD, pool = forward(model, params, pool, batch)
        sampled = sample(find_logits(model, params, x_RD), controls, position_R + 1, logprobs)
        buffers = record(buffers, at, sampled, is_running_R)
        is_stop_R = (sampled.token_R[:, None] == rows.stop_RL).any(axis=-1)
        is_running_R &= ~is_stop_R & (at + 1 < rows.limit_R)
        return at + 1, sampled.token_R, position_R + 1, is_running_R, pool, buffers

    def make(*shape: int, dtype: Any, fill: float) -> Array:
        return jnp.full((steps, *rows_R, *shape), fill, dtype)

    has_top = bool(logprobs)
    buffers = Decoded(
        make(dtype=jnp.int32, fill=-1),
        make(dtype=jnp.float32, fill=0) if logprobs is not None else None,
        make(logprobs or 0, dtype=jnp.int32, fill=-1) if has_top else None,
        make(logprobs or 0, dtype=jnp.float32, fill=0) if has_top else None,
    )
    is_running_R = (rows.position_R >= 0) & (rows.limit_R > 0)
    start = (jnp.int32(0), rows.token_R, rows.position_R, is_running_R, pool, buffers)
    *_, pool, buffers = lax.while_loop(is_going, advance, start)
    return pool, buffers


@functools.partial(jax.jit, static_argnames=("tower",), donate_argnames="features")
def encode_tiles(
    params: Parameters, features: Array, pixels_ICYX: Array, slot_I: Array, *, tower: VisionTower
) -> Array:
    """Encode image tiles into their slots of the feature buffer [slots, features, D], which is
    donated.

    Args:
        params: the tree of `declare_parameters`.
        features: the buffer.
        pixels_ICYX: normalized pixels.
        slot_I: int32 slot of each tile; a slot beyond the buffer is padding and writes nothing.
        tower: static.
    """
    found_IND = tower.apply({"params": params["vision"]}, pixels_ICYX.astype(features.dtype))
    return features.at[slot_I].set(found_IND, mode="drop")  # type: ignore[union-attr]
