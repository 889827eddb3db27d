"""The step, and the on-device loop of decode steps: the functions that the engine jits.

Shapes come from a short list of buckets, so that each function compiles a few times at the start
and never again. The pool is donated: pass it in, and use the one that is returned.
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
    # Weights and pages fill a device by design. XLA would take the program for too large, and
    # recompute many values of each layer to save a few bytes.
    "xla_disable_hlo_passes": "rematerialization",
    # Autotuning matrix products takes a minute per program, serially, and needs memory that the
    # weights may not leave. The largest products run in kernels of our own; for the rest the
    # library's first choice is within 3 % of the best.
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,  # slowest without autotuning
    # A custom kernel would be fused with the slice that it reads, and the fusion loses the in-place
    # update: it allocates another array of pages.
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # CUDA graphs contain loops and branches in addition to the default operations, at any size,
    # since a loop counts as one operation. A step or a whole loop is then one graph on one GPU; on
    # several GPUs, the part between two collectives is. Without graphs the host evaluates each
    # condition, and the next operation starts only after that.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
    # A launch in a graph waits for its inputs, not for all launches before it: a router scores
    # tokens while the norm of its experts runs.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
jit = functools.partial(jax.jit, compiler_options=_COMPILER_OPTIONS)
_LOGPROBS_BATCH = 64  # prompt tokens whose logits are in memory at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of each request on the device between two calls, by its slot. Donate it, and use
    the one that is returned.

    With it a step is dispatched before the host knows the sampled tokens of the last one.
    """

    last_token_S: Leaf  # int32: the last sampled token
    seen_SV: Leaf  # int32: token counts for penalties; see `sampling.LogitsProcessors`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitIndices:
    """The tokens of a step whose logits are computed."""

    # int32 index over all tokens of the step: the last token of each row, and with drafts the ones
    # before it; a row with fewer drafts repeats its last index.
    index_RW: Leaf
    slot_R: Leaf  # int32: the slot of the row's first sampled token; an id beyond the slots is none
    target_T: Leaf = None  # int32: the following prompt token, if its logprob is requested; else -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """The rows of a decode loop. Each row's token has been sampled, and not run yet."""

    token_R: Leaf  # int32; as in `Batch`, -1 - s is the last sampled token of slot s
    position_R: Leaf  # int32, of that token; -1 is an unused row
    row_R: Leaf  # int32, the row's own number within its data shard
    slot_R: Leaf  # int32, slot of the request; an id beyond the slots is none
    limit_R: Leaf  # int32, tokens that the row samples in this call, at most
    stop_RL: Leaf  # int32 ids that end the row, padded with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodedTokens:
    """The sampled tokens of a decode loop, in order; -1 after a row has ended."""

    token_SR: Leaf  # int32
    logprob_SR: Leaf = None
    top_token_SRL: Leaf = None
    top_logprob_SRL: Leaf = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the following prompt token, at each token of a step."""

    logprob_T: Array  # of the following token
    top_token_TL: Array
    top_logprob_TL: Array


_ROW = (axes.ROWS,)
DECODE_STATE_AXES = DecodeState((axes.SLOTS,), (axes.SLOTS, axes.VOCAB))
DECODE_ROWS_AXES = DecodeRows(_ROW, _ROW, _ROW, _ROW, _ROW, (axes.ROWS, axes.LIST))


def name_logit_indices_axes(*, has_targets: bool) -> LogitIndices:
    """Return the logical axis names of a step's logit indices."""
    return LogitIndices((axes.ROWS, axes.LIST), _ROW, (axes.TOKENS,) if has_targets else None)


def bind(model: Llama4, params: Parameters) -> Any:
    """Bind the text model to its weights; the result is `Llama4.apply` without its first argument.

    It returns hidden states and the pool of `(batch, pool, features)`, and logits of hidden states
    with `method="compute_logits"`.
    """
    return functools.partial(model.apply, {"params": params["text"]})


def step(
    params: Parameters,
    pool: PagePool,
    state: DecodeState,
    batch: Batch,
    logit_indices: LogitIndices,
    sampling_metadata: SamplingMetadata,
    logits_processors: LogitsProcessors | None = None,
    features: Array | None = None,
    *,
    model: Llama4,
    logprobs: int | None = None,
    shards: int = 1,
) -> tuple[PagePool, DecodeState, Sampled, PromptLogprobs | None]:
    """Run the tokens of a step, and sample a next token at each of its logit indices.

    Args:
        params: the tree of `declare_parameters`.
        pool, state: donated.
        batch: prompt chunks and single tokens, in any mix; a token -1 - s is the last sampled one
            of slot s.
        logit_indices: tokens whose logits are computed.
        sampling_metadata: sampling parameters of each row.
        logits_processors: applied to each row's logits before sampling.
        features: [slots, features, D] of the images, if the batch has image tokens.
        model: static.
        logprobs: static; see `sampling.sample`.
        shards: static; data shards, whose tokens are contiguous in the batch.

    Returns:
        The pool and the state; sampled tokens [R * W]; log-probabilities of
        `logit_indices.target_T`.
    """
    token_T = resolve_tokens(batch.token_T, state)
    batch = dataclasses.replace(batch, token_T=token_T)
    apply = bind(model, params)
    x_TD, pool = apply(batch, pool, features)
    width = logit_indices.index_RW.shape[1]
    index_X = logit_indices.index_RW.reshape(-1)
    sampling_metadata, logits_processors = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, width, axis=0), (sampling_metadata, logits_processors)
    )
    position_X = batch.position_T[index_X] + 1
    logits_XV = apply(x_TD[index_X], method="compute_logits")
    processed_XV = None
    if logits_processors is not None:
        processed_XV = apply_logits_processors(
            logits_XV, state.seen_SV, logits_processors, position_X
        )
    sampled = sample(logits_XV, sampling_metadata, position_X, logprobs, processed_XV)
    first_R = sampled.token_R.reshape(-1, width)[:, 0]
    counts = logits_processors is not None
    state = record_tokens(state, logit_indices.slot_R, first_R, counts=counts)
    prompt_logprobs = None
    if logit_indices.target_T is not None:
        prompt_logprobs = compute_prompt_logprobs(
            apply, x_TD, logit_indices.target_T, logprobs or 0, shards
        )
    return pool, state, sampled, prompt_logprobs


def resolve_tokens(token_T: Array, state: DecodeState) -> Array:
    """Replace each token -1 - s by the last sampled token of slot s."""
    return jnp.where(token_T >= 0, token_T, state.last_token_S[jnp.maximum(-1 - token_T, 0)])


def record_tokens(
    state: DecodeState, slot_R: Array, token_R: Array, *, counts: bool
) -> DecodeState:
    """Record sampled tokens in the state; tokens of a slot beyond it are dropped.

    They are counted only with logits processors: no other request has penalties.
    """
    seen_SV = state.seen_SV
    if counts:
        seen_SV = seen_SV.at[slot_R, token_R].add(1, mode="drop")
    return DecodeState(state.last_token_S.at[slot_R].set(token_R, mode="drop"), seen_SV)


def make_decode_state(slots: int, vocab: int) -> DecodeState:
    """Make an empty state. Trace it under jit to place it."""
    return DecodeState(jnp.zeros(slots, jnp.int32), jnp.zeros((slots, vocab), jnp.int32))


def compute_prompt_logprobs(
    apply: Any, x_TD: Array, target_T: Array, count: int, shards: int = 1
) -> PromptLogprobs:
    """Compute log-probabilities of the following tokens; zeros, without work, if none is requested.

    Logits are computed for a few tokens at a time: those of a whole step would take gigabytes. A
    block holds as many tokens of each data shard, because the head's einsum runs on each shard's
    own rows.

    Args:
        apply: of `bind`.
        x_TD: hidden states; each data shard's tokens are contiguous.
        target_T: int32 following tokens; -1 for none.
        count: number of the most likely tokens to report.
        shards: data shards.
    """
    tokens = len(target_T) // shards
    size = min(max(1, _LOGPROBS_BATCH // shards), tokens)  # tokens of a shard in a block
    blocks = -(-tokens // size)

    def split(x: Array) -> Array:
        """Cut [shards * tokens, ...] into [blocks, shards * size, ...], with zeros at the end."""
        x = x.reshape(shards, tokens, *x.shape[1:])
        padding = ((0, 0), (0, blocks * size - tokens), *[(0, 0)] * (x.ndim - 2))
        x = jnp.pad(x, padding).reshape(shards, blocks, size, *x.shape[2:])
        return x.swapaxes(0, 1).reshape(blocks, shards * size, *x.shape[3:])

    def join(y: Array) -> Array:
        """Undo `split`."""
        y = y.reshape(blocks, shards, size, *y.shape[2:]).swapaxes(0, 1)
        y = y.reshape(shards, blocks * size, *y.shape[3:])[:, :tokens]
        return y.reshape(shards * tokens, *y.shape[2:])

    def compute_block(block: tuple[Array, Array]) -> PromptLogprobs:
        x_XD, target_X = block
        logprob_XV = jax.nn.log_softmax(apply(x_XD, method="compute_logits"))
        target_X1 = jnp.maximum(target_X, 0)[:, None]
        top_XL, top_token_XL = lax.top_k(logprob_XV, count)
        found_X = jnp.take_along_axis(logprob_XV, target_X1, axis=1)[:, 0]
        return PromptLogprobs(found_X, top_token_XL.astype(jnp.int32), top_XL)

    def compute() -> PromptLogprobs:
        return jax.tree.map(join, lax.map(compute_block, (split(x_TD), split(target_T))))

    def skip() -> PromptLogprobs:
        shapes = jax.eval_shape(compute)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return lax.cond((target_T >= 0).any(), compute, skip)


def set_token_counts(state: DecodeState, slot: Array, seen_V: Array) -> DecodeState:
    """Set the token counts of a slot."""
    return DecodeState(state.last_token_S, state.seen_SV.at[slot].set(seen_V))


@functools.partial(jit, static_argnames=("model",), donate_argnames="pool")
def score(
    params: Parameters,
    pool: PagePool,
    batch: Batch,
    features: Array | None = None,
    *,
    model: Llama4,
) -> tuple[PagePool, Array]:
    """Run the tokens of a step, and return float32 logits [T, V] of all of them."""
    apply = bind(model, params)
    x_TD, pool = apply(batch, pool, features)
    return pool, apply(x_TD, method="compute_logits")


def decode_loop(
    params: Parameters,
    pool: PagePool,
    state: DecodeState,
    rows: DecodeRows,
    tables: PageTables,
    sampling_metadata: SamplingMetadata,
    logits_processors: LogitsProcessors | None = None,
    *,
    model: Llama4,
    steps: int,
    logprobs: int | None = None,
) -> tuple[PagePool, DecodeState, DecodedTokens]:
    """Decode up to `steps` tokens of each row on the device, and return them together.

    A row ends at a stop id or at its limit; the loop ends when all rows have. A row does not run if
    its first token comes from the state and is a stop id: it ended before the host knew. The caller
    owns enough pages in `tables`, and sets limits such that no row crosses a chunk boundary.
    """
    rows_R = rows.token_R.shape
    slots = state.last_token_S.shape[0]
    apply = bind(model, params)
    token_R = resolve_tokens(rows.token_R, state)

    def record(
        buffers: DecodedTokens, at: Array, sampled: Sampled, is_running_R: Array
    ) -> DecodedTokens:
        def put(buffer: Array | None, value: Array | None, empty: float) -> Array | None:
            if buffer is None or value is None:
                return None
            is_running = is_running_R.reshape(-1, *[1] * (value.ndim - 1))
            return buffer.at[at].set(jnp.where(is_running, value, empty).astype(buffer.dtype))

        return DecodedTokens(
            put(buffers.token_SR, sampled.token_R, -1),
            put(buffers.logprob_SR, sampled.logprob_R, 0),
            put(buffers.top_token_SRL, sampled.top_token_RL, -1),
            put(buffers.top_logprob_SRL, sampled.top_logprob_RL, 0),
        )

    def is_stop(token_R: Array) -> Array:
        return (token_R[:, None] == rows.stop_RL).any(axis=-1)

    def is_any_running(carry: Any) -> Array:
        at, _, _, is_running_R, *_ = carry
        return (at < steps) & is_running_R.any()

    def advance(carry: Any) -> Any:
        at, token_R, position_R, is_running_R, pool, state, buffers = carry
        batch = Batch(token_R, jnp.where(is_running_R, position_R, -1), rows.row_R, tables)
        x_RD, pool = apply(batch, pool)
        logits_RV, processed_RV = apply(x_RD, method="compute_logits"), None
        if logits_processors is not None:
            processed_RV = apply_logits_processors(
                logits_RV, state.seen_SV, logits_processors, position_R + 1
            )
        sampled = sample(logits_RV, sampling_metadata, position_R + 1, logprobs, processed_RV)
        buffers = record(buffers, at, sampled, is_running_R)
        slot_R = jnp.where(is_running_R, rows.slot_R, slots)
        state = record_tokens(state, slot_R, sampled.token_R, counts=logits_processors is not None)
        is_running_R &= ~is_stop(sampled.token_R) & (at + 1 < rows.limit_R)
        return at + 1, sampled.token_R, position_R + 1, is_running_R, pool, state, buffers

    def make_buffer(*shape: int, dtype: Any, fill: float) -> Array:
        return jnp.full((steps, *rows_R, *shape), fill, dtype)

    has_top = bool(logprobs)
    buffers = DecodedTokens(
        make_buffer(dtype=jnp.int32, fill=-1),
        make_buffer(dtype=jnp.float32, fill=0) if logprobs is not None else None,
        make_buffer(logprobs or 0, dtype=jnp.int32, fill=-1) if has_top else None,
        make_buffer(logprobs or 0, dtype=jnp.float32, fill=0) if has_top else None,
    )
    has_ended_R = (rows.token_R < 0) & is_stop(token_R)
    is_running_R = (rows.position_R >= 0) & (rows.limit_R > 0) & ~has_ended_R
    start = (jnp.int32(0), token_R, rows.position_R, is_running_R, pool, state, buffers)
    *_, pool, state, buffers = lax.while_loop(is_any_running, advance, start)
    return pool, state, buffers


def encode_tiles(
    params: Parameters, features: Array, pixels_ICYX: Array, slot_I: Array, *, tower: VisionTower
) -> Array:
    """Encode image tiles into their slots of the feature buffer [slots, features, D].

    Args:
        params: the tree of `declare_parameters`.
        features: the buffer; donated.
        pixels_ICYX: normalized pixels.
        slot_I: int32 slot of each tile; a slot beyond the buffer is padding and writes nothing.
        tower: static.
    """
    encoded_IND = tower.apply({"params": params["vision"]}, pixels_ICYX.astype(features.dtype))
    return features.at[slot_I].set(encoded_IND, mode="drop")  # type: ignore[union-attr]


# Jitted functions, of arrays only. Donated arrays are returned with the sharding that they had: the
# compiler would choose an equivalent one, and each program would be compiled for every program
# whose outputs it takes. Each factory is cached, so that engines with equal arguments share it.


@functools.cache
def jit_step(
    model: Llama4, logprobs: int | None, shards: int, pool: PagePool, state: DecodeState
) -> Any:
    """Jit `step` for a model on data shards; pool and state are trees of shardings."""
    return jit(
        functools.partial(step, model=model, logprobs=logprobs, shards=shards),
        donate_argnums=(1, 2),
        out_shardings=(pool, state, None, None),
    )


@functools.cache
def jit_decode_loop(
    model: Llama4, steps: int, logprobs: int | None, pool: PagePool, state: DecodeState
) -> Any:
    """Jit `decode_loop` for a model; pool and state are trees of shardings."""
    return jit(
        functools.partial(decode_loop, model=model, steps=steps, logprobs=logprobs),
        donate_argnums=(1, 2),
        out_shardings=(pool, state, None),
    )


@functools.cache
def jit_encode_tiles(tower: VisionTower, features: Any) -> Any:
    """Jit `encode_tiles` for a vision tower; `features` is the sharding of the buffer."""
    return jit(
        functools.partial(encode_tiles, tower=tower), donate_argnums=1, out_shardings=features
    )


@functools.cache
def jit_set_token_counts(state: DecodeState) -> Any:
    """Jit `set_token_counts`; `state` is a tree of shardings."""
    return jit(set_token_counts, donate_argnums=0, out_shardings=state)
