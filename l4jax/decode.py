"""The step, and the device-side loop of many steps: what the engine jits (`make_programs`), and
nothing else runs on a device.

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
from l4jax.cache import Batch, Leaf, PagePool, PageTables
from l4jax.model import Llama4, Parameters, VisionTower
from l4jax.sampling import (
    LogitsProcessors,
    Sampled,
    SamplingMetadata,
    apply_logits_processors,
    sample,
)

_COMPILER_OPTIONS = {
    # Weights and pages fill a device by design. XLA takes that for a program that is too large, and
    # to save a few bytes would compute many things of each layer twice.
    "xla_disable_hlo_passes": "rematerialization",
    # Trying products on the device takes a minute for each program, one after the other, and beside
    # the weights there may be no room to try them in. What matters most is in kernels of our own;
    # of the rest the library's first choice is within 3 % of the best.
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,  # of which the untried choice is the worst
    # A kernel of ours that takes a slice would be wrapped together with that, and the wrapping
    # forgets that the kernel writes in place: it asks for a whole array of pages beside it.
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # What may be in a CUDA graph: loops and branches beside what is by default; and of any size,
    # since a loop counts as one thing. A step, or all of a loop's, is one graph then, that a GPU
    # runs by itself; on several, what lies between two collectives is. Else the host would look at
    # each condition, and what comes next would begin when it had seen that this has ended.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
    # Launches of a graph wait for what they read, not for all that come before them: a router
    # scores tokens while the norm of its experts runs.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
jit = functools.partial(jax.jit, compiler_options=_COMPILER_OPTIONS)
_SCORED_TOGETHER = 64  # tokens of a step whose logits are in memory at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the device remembers of each request between two calls, by its slot. Donate it and use
    what comes back.

    With it a step can be dispatched before the host knows what the last one drew.
    """

    last_S: Leaf  # int32: the token drawn last
    seen_SV: Leaf  # int32: token counts for penalties; see `sampling.LogitsProcessors`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitIndices:
    """The tokens of a step whose logits count."""

    # int32 index over all tokens of the step: of each row the last one, and, where some are
    # guesses, those before it; a row with fewer repeats its last.
    at_RW: Leaf
    slot_R: Leaf  # int32: where what is drawn at the row's first is kept; beyond them is nowhere
    target_T: Leaf = None  # int32: the token that follows each, where somebody asks; else -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """Where each row of a decode loop stands. The token has been chosen and not yet been run."""

    token_R: Leaf  # int32; as in `Batch`, -1 - s is the token drawn last in slot s
    position_R: Leaf  # int32, of that token; -1 is an unused row
    row_R: Leaf  # int32, the row's own number within its data shard
    slot_R: Leaf  # int32, where the last token is kept; beyond the slots is nowhere
    limit_R: Leaf  # int32, tokens that the row may still choose in this call
    stop_RL: Leaf  # int32 ids that end the row, filled up with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodedTokens:
    """The tokens that a decode loop chose, in order; -1 where a row had ended."""

    token_SR: Leaf  # int32
    logprob_SR: Leaf = None
    top_token_SRL: Leaf = None
    top_logprob_SRL: Leaf = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the tokens that follow, at each token of a step."""

    logprob_T: Array  # of the one that follows
    top_token_TL: Array
    top_logprob_TL: Array


_ROW = (axes.ROWS,)
DECODE_STATE_AXES = DecodeState((axes.SLOTS,), (axes.SLOTS, axes.VOCAB))
DECODE_ROWS_AXES = DecodeRows(_ROW, _ROW, _ROW, _ROW, _ROW, (axes.ROWS, axes.LIST))


def name_logit_indices_axes(*, has_targets: bool) -> LogitIndices:
    """The logical names of the axes of a step's ends."""
    return LogitIndices((axes.ROWS, axes.LIST), _ROW, (axes.TOKENS,) if has_targets else None)


def forward(
    model: Llama4, params: Parameters, pool: PagePool, batch: Batch, features: Array | None = None
) -> tuple[Array, PagePool]:
    """Hidden states [T, D] of the tokens of a step, and the pool with them in it."""
    if features is not None:
        features = features.reshape(-1, features.shape[-1])
    variables = {"params": params["text"]}
    return model.apply(variables, batch, pool, features)  # type: ignore[return-value]


def compute_logits(model: Llama4, params: Parameters, x_RD: Array) -> Array:
    """[R, V] float32 logits of hidden states."""
    return model.apply({"params": params["text"]}, x_RD, method="compute_logits")  # type: ignore[return-value]


def step(
    params: Parameters,
    pool: PagePool,
    memory: DecodeState,
    batch: Batch,
    ends: LogitIndices,
    controls: SamplingMetadata,
    adjustments: LogitsProcessors | None = None,
    features: Array | None = None,
    *,
    model: Llama4,
    logprobs: int | None = None,
) -> tuple[PagePool, DecodeState, Sampled, PromptLogprobs | None]:
    """Run the tokens of a step and draw a next token for each of its ends.

    Args:
        params: the tree of `declare_parameters`.
        pool, memory: donated.
        batch: prompt chunks and single tokens, in any mix; a token -1 - s is the one drawn last in
            slot s.
        ends: whose logits count.
        controls: how each row is sampled.
        adjustments: what changes its logits before that.
        features: [slots, features, D] of the images, where the batch points into them.
        model: static.
        logprobs: static; see `sampling.sample`.

    Returns:
        Pool and memory; what was drawn, [R * W]; what `ends.target_T` asked for.
    """
    token_T = resolve_tokens(batch.token_T, memory)
    batch = dataclasses.replace(batch, token_T=token_T)
    x_TD, pool = forward(model, params, pool, batch, features)
    width = ends.at_RW.shape[1]
    at_X = ends.at_RW.reshape(-1)
    controls, adjustments = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, width, axis=0), (controls, adjustments)
    )
    position_X = batch.position_T[at_X] + 1
    logits_XV = compute_logits(model, params, x_TD[at_X])
    adjusted_XV = None
    if adjustments is not None:
        adjusted_XV = apply_logits_processors(logits_XV, memory.seen_SV, adjustments, position_X)
    sampled = sample(logits_XV, controls, position_X, logprobs, adjusted_XV)
    first_R = sampled.token_R.reshape(-1, width)[:, 0]
    memory = record_tokens(memory, ends.slot_R, first_R, counts=adjustments is not None)
    scored = None
    if ends.target_T is not None:
        scored = compute_prompt_logprobs(model, params, x_TD, ends.target_T, logprobs or 0)
    return pool, memory, sampled, scored


def resolve_tokens(token_T: Array, memory: DecodeState) -> Array:
    """Token ids, with what the memory holds where -1 - s stands for the token of slot s."""
    return jnp.where(token_T >= 0, token_T, memory.last_S[jnp.maximum(-1 - token_T, 0)])


def record_tokens(
    memory: DecodeState, slot_R: Array, token_R: Array, *, counts: bool
) -> DecodeState:
    """The memory with the tokens that were drawn; a slot beyond it remembers nothing.

    They are counted where rows are adjusted, and only there: nobody else has penalties.
    """
    seen_SV = memory.seen_SV
    if counts:
        seen_SV = seen_SV.at[slot_R, token_R].add(1, mode="drop")
    return DecodeState(memory.last_S.at[slot_R].set(token_R, mode="drop"), seen_SV)


def make_decode_state(slots: int, vocab: int) -> DecodeState:
    """A memory of nothing. Trace it under jit to place it."""
    return DecodeState(jnp.zeros(slots, jnp.int32), jnp.zeros((slots, vocab), jnp.int32))


def compute_prompt_logprobs(
    model: Llama4, params: Parameters, x_TD: Array, target_T: Array, count: int
) -> PromptLogprobs:
    """Log-probabilities of the tokens that follow; zeros, and no work, where nobody asks.

    Logits are made for a few tokens at a time: those of a whole step would take gigabytes.
    """

    def look(pair: tuple[Array, Array]) -> PromptLogprobs:
        x_D, target = pair
        logprob_V = jax.nn.log_softmax(compute_logits(model, params, x_D[None])[0])
        top_L, top_token_L = lax.top_k(logprob_V, count)
        return PromptLogprobs(
            logprob_V[jnp.maximum(target, 0)], top_token_L.astype(jnp.int32), top_L
        )

    def find() -> PromptLogprobs:
        return lax.map(look, (x_TD, target_T), batch_size=min(_SCORED_TOGETHER, len(target_T)))

    def skip() -> PromptLogprobs:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(find))

    return lax.cond((target_T >= 0).any(), find, skip)


def set_seen(memory: DecodeState, slot: Array, seen_V: Array) -> DecodeState:
    """The memory with what the tokens of a slot hold."""
    return DecodeState(memory.last_S, memory.seen_SV.at[slot].set(seen_V))


@functools.partial(jit, static_argnames=("model",), donate_argnames="pool")
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
    return pool, compute_logits(model, params, x_TD)


def decode_loop(
    params: Parameters,
    pool: PagePool,
    memory: DecodeState,
    rows: DecodeRows,
    tables: PageTables,
    controls: SamplingMetadata,
    adjustments: LogitsProcessors | None = None,
    *,
    model: Llama4,
    steps: int,
    logprobs: int | None = None,
) -> tuple[PagePool, DecodeState, DecodedTokens]:
    """Decode up to `steps` tokens for each row on the device, and return them at once.

    A row ends at a stop id or at its limit; the loop ends when all rows have. One whose token comes
    from the memory and is a stop id does not run: it had ended, and the host did not know it yet.
    The caller owns enough pages in `tables`, and sets limits that no row crosses a chunk boundary
    with.
    """
    rows_R = rows.token_R.shape
    slots = memory.last_S.shape[0]
    token_R = resolve_tokens(rows.token_R, memory)

    def record(
        buffers: DecodedTokens, at: Array, sampled: Sampled, is_running_R: Array
    ) -> DecodedTokens:
        def put(buffer: Array | None, value: Array | None, nothing: float) -> Array | None:
            if buffer is None or value is None:
                return None
            shown = jnp.where(is_running_R.reshape(-1, *[1] * (value.ndim - 1)), value, nothing)
            return buffer.at[at].set(shown.astype(buffer.dtype))

        return DecodedTokens(
            put(buffers.token_SR, sampled.token_R, -1),
            put(buffers.logprob_SR, sampled.logprob_R, 0),
            put(buffers.top_token_SRL, sampled.top_token_RL, -1),
            put(buffers.top_logprob_SRL, sampled.top_logprob_RL, 0),
        )

    def is_stop(token_R: Array) -> Array:
        return (token_R[:, None] == rows.stop_RL).any(axis=-1)

    def is_going(carry: Any) -> Array:
        at, _, _, is_running_R, *_ = carry
        return (at < steps) & is_running_R.any()

    def advance(carry: Any) -> Any:
        at, token_R, position_R, is_running_R, pool, memory, buffers = carry
        batch = Batch(token_R, jnp.where(is_running_R, position_R, -1), rows.row_R, tables)
        x_RD, pool = forward(model, params, pool, batch)
        logits_RV, adjusted_RV = compute_logits(model, params, x_RD), None
        if adjustments is not None:
            adjusted_RV = apply_logits_processors(
                logits_RV, memory.seen_SV, adjustments, position_R + 1
            )
        sampled = sample(logits_RV, controls, position_R + 1, logprobs, adjusted_RV)
        buffers = record(buffers, at, sampled, is_running_R)
        slot_R = jnp.where(is_running_R, rows.slot_R, slots)
        memory = record_tokens(memory, slot_R, sampled.token_R, counts=adjustments is not None)
        is_running_R &= ~is_stop(sampled.token_R) & (at + 1 < rows.limit_R)
        return at + 1, sampled.token_R, position_R + 1, is_running_R, pool, memory, buffers

    def make(*shape: int, dtype: Any, fill: float) -> Array:
        return jnp.full((steps, *rows_R, *shape), fill, dtype)

    has_top = bool(logprobs)
    buffers = DecodedTokens(
        make(dtype=jnp.int32, fill=-1),
        make(dtype=jnp.float32, fill=0) if logprobs is not None else None,
        make(logprobs or 0, dtype=jnp.int32, fill=-1) if has_top else None,
        make(logprobs or 0, dtype=jnp.float32, fill=0) if has_top else None,
    )
    has_ended_R = (rows.token_R < 0) & is_stop(token_R)
    is_running_R = (rows.position_R >= 0) & (rows.limit_R > 0) & ~has_ended_R
    start = (jnp.int32(0), token_R, rows.position_R, is_running_R, pool, memory, buffers)
    *_, pool, memory, buffers = lax.while_loop(is_going, advance, start)
    return pool, memory, buffers


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


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions of this file, jitted: each compiles once for every shape that it is called
    with.
    """

    step: Any
    decode_loop: Any
    set_seen: Any
    encode_tiles: Any


@functools.cache
def make_programs(pool: PagePool, memory: DecodeState, features: Any) -> Programs:
    """Jit for these placements, `jax.sharding.Sharding`s of each array.

    What is donated comes back placed as it went in. Left to the compiler it would come back as
    something equivalent, and each program would be compiled for what each other program returns.
    """
    return Programs(
        jit(
            step,
            static_argnames=("model", "logprobs"),
            donate_argnames=("pool", "memory"),
            out_shardings=(pool, memory, None, None),
        ),
        jit(
            decode_loop,
            static_argnames=("model", "steps", "logprobs"),
            donate_argnames=("pool", "memory"),
            out_shardings=(pool, memory, None),
        ),
        jit(set_seen, donate_argnames="memory", out_shardings=memory),
        jit(
            encode_tiles,
            static_argnames=("tower",),
            donate_argnames="features",
            out_shardings=features,
        ),
    )
