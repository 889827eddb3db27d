"""The jitted programs of the engine: a step, and an on-device loop of decode steps.

Nothing else runs on the devices while the engine serves. Shapes come from a short list of buckets,
so that each function compiles a few times at the start and never again. The KV cache and the decode
state are donated: pass them in, and use what comes back.
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
    # Weights and KV pages fill a device by design. XLA would take the program for too large, and
    # compute much of each layer twice to save a few bytes.
    "xla_disable_hlo_passes": "rematerialization",
    # Autotuning runs each matmul on the device: a minute a program, and there may be no memory for
    # its inputs. Our own kernels do most of the work; for the rest cuBLAS's first choice is within
    # 3 % of the best.
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,  # the worst choice without autotuning
    # A dynamic-slice fusion around a kernel of ours forgets that the kernel writes in place, and
    # allocates a whole array of KV pages.
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # CUDA graphs may hold loops and branches, and have any size: a loop counts as one node. On one
    # GPU a step, or a whole decode loop, is then one graph. Without it the host would evaluate each
    # condition, and the GPU would wait for it. On several GPUs a graph ends at each collective.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
    # A launch waits for its inputs, not for all earlier launches: a router scores tokens during the
    # norm of its experts.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
jit = functools.partial(jax.jit, compiler_options=_COMPILER_OPTIONS)
_SCORED_TOGETHER = 64  # tokens whose logits are in memory at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of each request on the devices, by its slot. Donated.

    It holds the last sampled token, so that the engine dispatches a step before it has read the
    tokens of the last one.
    """

    last_S: Leaf  # int32: token sampled last
    seen_SV: Leaf  # int32: token counts for penalties; see `sampling.LogitsProcessors`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitIndices:
    """The tokens of a step whose logits are computed."""

    # int32 indices over all tokens of the step: the last token of each row and, with speculation,
    # the draft tokens before it. A row with fewer draft tokens repeats its last index.
    at_RW: Leaf
    slot_R: Leaf  # int32: slot that keeps the row's first sampled token; out of range keeps none
    target_T: Leaf = None  # int32: next prompt token, where prompt logprobs are asked for; else -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """The rows of a decode loop. Each starts with a sampled token that has not run yet."""

    token_R: Leaf  # int32; as in `Batch`, -1 - s is the token sampled last in slot s
    position_R: Leaf  # int32 position of that token; -1 is an unused row
    row_R: Leaf  # int32: row index within its data shard
    slot_R: Leaf  # int32: slot that keeps the last token; out of range keeps none
    limit_R: Leaf  # int32: tokens that the row may still sample in this call
    stop_RL: Leaf  # int32 ids that end the row, padded with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodedTokens:
    """The tokens that a decode loop sampled, in order; -1 after a row's end."""

    token_SR: Leaf  # int32
    logprob_SR: Leaf = None
    top_token_SRL: Leaf = None
    top_logprob_SRL: Leaf = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the next prompt token at each token of a step."""

    logprob_T: Array  # of the next token
    top_token_TL: Array
    top_logprob_TL: Array


_ROW = (axes.ROWS,)
DECODE_STATE_AXES = DecodeState((axes.SLOTS,), (axes.SLOTS, axes.VOCAB))
DECODE_ROWS_AXES = DecodeRows(_ROW, _ROW, _ROW, _ROW, _ROW, (axes.ROWS, axes.LIST))


def name_logit_indices_axes(*, has_targets: bool) -> LogitIndices:
    """Return the logical axis names of a step's logit indices."""
    return LogitIndices((axes.ROWS, axes.LIST), _ROW, (axes.TOKENS,) if has_targets else None)


def forward(
    model: Llama4, params: Parameters, pool: PagePool, batch: Batch, features: Array | None = None
) -> tuple[Array, PagePool]:
    """Run the tokens of a step.

    Returns:
        Hidden states [T, D], and the pool with the step's keys and values.
    """
    if features is not None:
        features = features.reshape(-1, features.shape[-1])
    variables = {"params": params["text"]}
    return model.apply(variables, batch, pool, features)  # type: ignore[return-value]


def compute_logits(model: Llama4, params: Parameters, x_RD: Array) -> Array:
    """Compute the [R, V] float32 logits of hidden states."""
    return model.apply({"params": params["text"]}, x_RD, method="compute_logits")  # type: ignore[return-value]


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
) -> tuple[PagePool, DecodeState, Sampled, PromptLogprobs | None]:
    """Run the tokens of a step, and sample a token at each logit index.

    Args:
        params: the tree of `declare_parameters`.
        pool, state: donated.
        batch: prompt chunks and single tokens, in any mix; a token -1 - s is the token sampled last
            in slot s.
        logit_indices: the tokens whose logits are computed.
        sampling_metadata: sampling settings of each row.
        logits_processors: changes to each row's logits before sampling.
        features: [slots, features, D] image features, where the batch refers to them.
        model: static.
        logprobs: static; see `sampling.sample`.

    Returns:
        Pool and state; sampled tokens, [R * W]; prompt logprobs, if the batch has target tokens.
    """
    batch = dataclasses.replace(batch, token_T=resolve_tokens(batch.token_T, state))
    x_TD, pool = forward(model, params, pool, batch, features)
    width = logit_indices.at_RW.shape[1]
    at_X = logit_indices.at_RW.reshape(-1)
    sampling_metadata, logits_processors = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, width, axis=0), (sampling_metadata, logits_processors)
    )
    position_X = batch.position_T[at_X] + 1
    logits_XV = compute_logits(model, params, x_TD[at_X])
    processed_XV = None
    if logits_processors is not None:
        processed_XV = apply_logits_processors(
            logits_XV, state.seen_SV, logits_processors, position_X
        )
    sampled = sample(logits_XV, sampling_metadata, position_X, logprobs, processed_XV)
    first_R = sampled.token_R.reshape(-1, width)[:, 0]
    has_counts = logits_processors is not None
    state = record_tokens(state, logit_indices.slot_R, first_R, has_counts=has_counts)
    prompt_logprobs = None
    if logit_indices.target_T is not None:
        prompt_logprobs = compute_prompt_logprobs(
            model, params, x_TD, logit_indices.target_T, logprobs or 0
        )
    return pool, state, sampled, prompt_logprobs


def resolve_tokens(token_T: Array, state: DecodeState) -> Array:
    """Replace each token -1 - s by the token sampled last in slot s."""
    return jnp.where(token_T >= 0, token_T, state.last_S[jnp.maximum(-1 - token_T, 0)])


def record_tokens(
    state: DecodeState, slot_R: Array, token_R: Array, *, has_counts: bool
) -> DecodeState:
    """Write sampled tokens into their slots; a slot out of range is dropped.

    Tokens are counted only for rows with logits processors: no other row has penalties.
    """
    seen_SV = state.seen_SV
    if has_counts:
        seen_SV = seen_SV.at[slot_R, token_R].add(1, mode="drop")
    return DecodeState(state.last_S.at[slot_R].set(token_R, mode="drop"), seen_SV)


def make_decode_state(slots: int, vocab: int) -> DecodeState:
    """Make a decode state of zeros. Trace it under jit to place it."""
    return DecodeState(jnp.zeros(slots, jnp.int32), jnp.zeros((slots, vocab), jnp.int32))


def compute_prompt_logprobs(
    model: Llama4, params: Parameters, x_TD: Array, target_T: Array, count: int
) -> PromptLogprobs:
    """Compute log-probabilities of the target tokens; zeros, at no cost, without targets.

    Logits are computed for a few tokens at a time: the logits of a whole step take gigabytes.
    """

    def score(pair: tuple[Array, Array]) -> PromptLogprobs:
        x_D, target = pair
        logprob_V = jax.nn.log_softmax(compute_logits(model, params, x_D[None])[0])
        top_L, top_token_L = lax.top_k(logprob_V, count)
        target_logprob = logprob_V[jnp.maximum(target, 0)]
        return PromptLogprobs(target_logprob, top_token_L.astype(jnp.int32), top_L)

    def compute() -> PromptLogprobs:
        return lax.map(score, (x_TD, target_T), batch_size=min(_SCORED_TOGETHER, len(target_T)))

    def skip() -> PromptLogprobs:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute))

    return lax.cond((target_T >= 0).any(), compute, skip)


def set_token_counts(state: DecodeState, slot: Array, seen_V: Array) -> DecodeState:
    """Set the token counts of a slot."""
    return DecodeState(state.last_S, state.seen_SV.at[slot].set(seen_V))


@functools.partial(jit, static_argnames=("model",), donate_argnames="pool")
def score(
    params: Parameters,
    pool: PagePool,
    batch: Batch,
    features: Array | None = None,
    *,
    model: Llama4,
) -> tuple[PagePool, Array]:
    """Run the tokens of a step, and return the [T, V] float32 logits of all tokens."""
    x_TD, pool = forward(model, params, pool, batch, features)
    return pool, compute_logits(model, params, x_TD)


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
    """Decode up to `steps` tokens of each row on the devices, in one call.

    A row ends at a stop id or at its limit; the loop ends when all rows have ended. A row whose
    first token comes from the decode state and is a stop id does not run: it had ended before the
    host knew. The caller owns the pages in `tables`, and sets limits that keep each row within its
    chunk.
    """
    rows_R = rows.token_R.shape
    slots = state.last_S.shape[0]
    token_R = resolve_tokens(rows.token_R, state)

    def record(
        buffers: DecodedTokens, at: Array, sampled: Sampled, is_running_R: Array
    ) -> DecodedTokens:
        def write(buffer: Array | None, value: Array | None, padding: float) -> Array | None:
            if buffer is None or value is None:
                return None
            shown = jnp.where(is_running_R.reshape(-1, *[1] * (value.ndim - 1)), value, padding)
            return buffer.at[at].set(shown.astype(buffer.dtype))

        return DecodedTokens(
            write(buffers.token_SR, sampled.token_R, -1),
            write(buffers.logprob_SR, sampled.logprob_R, 0),
            write(buffers.top_token_SRL, sampled.top_token_RL, -1),
            write(buffers.top_logprob_SRL, sampled.top_logprob_RL, 0),
        )

    def is_stop(token_R: Array) -> Array:
        return (token_R[:, None] == rows.stop_RL).any(axis=-1)

    def is_going(carry: Any) -> Array:
        at, _, _, is_running_R, *_ = carry
        return (at < steps) & is_running_R.any()

    def advance(carry: Any) -> Any:
        at, token_R, position_R, is_running_R, pool, state, buffers = carry
        batch = Batch(token_R, jnp.where(is_running_R, position_R, -1), rows.row_R, tables)
        x_RD, pool = forward(model, params, pool, batch)
        logits_RV, processed_RV = compute_logits(model, params, x_RD), None
        if logits_processors is not None:
            processed_RV = apply_logits_processors(
                logits_RV, state.seen_SV, logits_processors, position_R + 1
            )
        sampled = sample(logits_RV, sampling_metadata, position_R + 1, logprobs, processed_RV)
        buffers = record(buffers, at, sampled, is_running_R)
        slot_R = jnp.where(is_running_R, rows.slot_R, slots)
        has_counts = logits_processors is not None
        state = record_tokens(state, slot_R, sampled.token_R, has_counts=has_counts)
        is_running_R &= ~is_stop(sampled.token_R) & (at + 1 < rows.limit_R)
        return at + 1, sampled.token_R, position_R + 1, is_running_R, pool, state, buffers

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
    start = (jnp.int32(0), token_R, rows.position_R, is_running_R, pool, state, buffers)
    *_, pool, state, buffers = lax.while_loop(is_going, advance, start)
    return pool, state, buffers


def encode_tiles(
    params: Parameters, features: Array, pixels_ICYX: Array, slot_I: Array, *, tower: VisionTower
) -> Array:
    """Encode image tiles into their slots of the feature buffer.

    Args:
        params: the tree of `declare_parameters`.
        features: the buffer [slots, features, D], donated.
        pixels_ICYX: normalized pixels.
        slot_I: int32 slot of each tile; a slot out of range is padding and writes nothing.
        tower: static.
    """
    encoded_IND = tower.apply({"params": params["vision"]}, pixels_ICYX.astype(features.dtype))
    return features.at[slot_I].set(encoded_IND, mode="drop")  # type: ignore[union-attr]


@functools.cache
def jit_functions(pool: PagePool, state: DecodeState, features: Any) -> dict[str, Any]:
    """Jit the functions of this file for these shardings of pool, decode state and features.

    Donated arrays come back with the sharding that they went in with. The compiler's own choice
    would be an equivalent sharding of another name, and each function would compile again for the
    results of the others.

    Returns:
        The jitted functions by name: step, decode_loop, set_token_counts, encode_tiles.
    """
    return {
        "step": jit(
            step,
            static_argnames=("model", "logprobs"),
            donate_argnames=("pool", "state"),
            out_shardings=(pool, state, None, None),
        ),
        "decode_loop": jit(
            decode_loop,
            static_argnames=("model", "steps", "logprobs"),
            donate_argnames=("pool", "state"),
            out_shardings=(pool, state, None),
        ),
        "set_token_counts": jit(set_token_counts, donate_argnames="state", out_shardings=state),
        "encode_tiles": jit(
            encode_tiles,
            static_argnames=("tower",),
            donate_argnames="features",
            out_shardings=features,
        ),
    }
