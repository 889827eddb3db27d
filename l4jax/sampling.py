"""Sampling: logits to tokens, each row by its own parameters, independent of the batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.random import threefry2x32_p

from l4jax import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingMetadata:
    """Sampling parameters of each row, with the meanings of vLLM's `SamplingParams`.

    Leaves are numpy or jax arrays.
    """

    temperature_R: Any  # float32; 0 is greedy
    top_k_R: Any  # int32; 0 keeps all
    top_p_R: Any  # float32; 1 keeps all
    min_p_R: Any  # float32; 0 keeps all
    seed_R: Any  # uint32, the lower half of the 64-bit seed
    seed_high_R: Any  # uint32, the upper half


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """The sampled token of each row, and log-probabilities if requested.

    Log-probabilities are of the model's own distribution, before temperature and filters.
    """

    token_R: Array  # int32
    logprob_R: Array | None = None  # float32, of that token
    top_token_RL: Array | None = None  # int32, the likeliest first
    top_logprob_RL: Array | None = None  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitsProcessors:
    """Changes of each row's logits before sampling. Leaves are numpy or jax arrays.

    `seen_SV` counts, per slot, the occurrences of each token in the output; `IN_PROMPT` is added
    for tokens of the prompt.
    """

    slot_R: Any  # int32, of the row in seen_SV; an id beyond the slots is none
    presence_R: Any  # float32
    frequency_R: Any  # float32
    repetition_R: Any  # float32; 1 changes nothing
    bias_token_RL: Any  # int32; -1 is unused
    bias_RL: Any  # float32, added to those tokens
    first_stop_R: Any  # int32, first position at which ids of stop_RL may be sampled
    stop_RL: Any  # int32; -1 is unused
    allowed_RL: Any  # int32 [R, vocab / 32]: bit i of word w allows token 32 w + i


IN_PROMPT = 1 << 30  # far above any count

_ROW, _LIST = (axes.ROWS,), (axes.ROWS, axes.LIST)
SAMPLING_METADATA_AXES = SamplingMetadata(*[_ROW] * 6)
LOGITS_PROCESSORS_AXES = LogitsProcessors(_ROW, _ROW, _ROW, _ROW, _LIST, _LIST, _ROW, _LIST, _LIST)


def apply_logits_processors(
    logits_RV: Array, seen_SV: Array, processors: LogitsProcessors, position_R: Array
) -> Array:
    """Set logits of forbidden tokens to -inf, and apply biases, then penalties: vLLM's order.

    Penalties are vLLM's: the repetition penalty divides positive logits, and multiplies others, of
    tokens in prompt or output; frequency and presence penalties apply to tokens of the output.

    Args:
        logits_RV: float32.
        seen_SV: int32 token counts of prompt and output.
        processors: of each row.
        position_R: int32 position of the token to sample.
    """
    p = processors

    def penalize(logits_RV: Array) -> Array:
        seen_RV = seen_SV.at[p.slot_R].get(mode="fill", fill_value=0)
        count_RV = (seen_RV & (IN_PROMPT - 1)).astype(jnp.float32)
        occurs_RV = (count_RV > 0).astype(jnp.float32)
        repetition_RV = jnp.where(seen_RV > 0, p.repetition_R[:, None], 1.0)
        logits_RV = jnp.where(logits_RV > 0, logits_RV / repetition_RV, logits_RV * repetition_RV)
        return logits_RV - p.frequency_R[:, None] * count_RV - p.presence_R[:, None] * occurs_RV

    def add(logits_RV: Array, token_RL: Array, value_RL: Array) -> Array:
        """Add to the logits of listed tokens; -1 is mapped beyond the vocabulary, and dropped."""
        vocab = logits_RV.shape[1]
        token_RL = jnp.where(token_RL >= 0, token_RL, vocab)
        return jax.vmap(lambda row, at, value: row.at[at].add(value, mode="drop"))(
            logits_RV, token_RL, value_RL
        )

    bits = jnp.arange(32)
    allowed_RV = (p.allowed_RL[:, :, None] >> bits & 1).reshape(len(p.allowed_RL), -1)
    logits_RV = jnp.where(allowed_RV[:, : logits_RV.shape[1]] == 1, logits_RV, -jnp.inf)
    is_early_R = position_R < p.first_stop_R
    stop_RL = jnp.where(is_early_R[:, None], p.stop_RL, -1)
    logits_RV = add(logits_RV, stop_RL, jnp.full(stop_RL.shape, -jnp.inf, logits_RV.dtype))
    logits_RV = add(logits_RV, p.bias_token_RL, p.bias_RL)
    has_penalties = ((p.presence_R != 0) | (p.frequency_R != 0) | (p.repetition_R != 1)).any()
    return lax.cond(has_penalties, penalize, lambda x: x, logits_RV)


def sample(
    logits_RV: Array,
    metadata: SamplingMetadata,
    position_R: Array,
    logprobs: int | None,
    processed_RV: Array | None = None,
) -> Sampled:
    """Sample a token for each row.

    The token depends only on the row's logits, its parameters, its seed and the token's position:
    the same request with the same seed gives the same tokens in any batch.

    Args:
        logits_RV: float32.
        metadata: sampling parameters of each row.
        position_R: int32 position of the token to sample.
        logprobs: number of likeliest tokens to report; 0 reports the sampled token only, None
            nothing.
        processed_RV: logits to sample from instead; reported log-probabilities are those of
            `logits_RV`.
    """
    from_RV = logits_RV if processed_RV is None else processed_RV
    is_greedy_R = metadata.temperature_R <= 0
    best_R = jnp.argmax(from_RV, axis=-1)

    def sample_softmax() -> Array:
        kept_RV = _filter(_scale(from_RV, metadata), metadata)
        noise_RV = _make_noise(metadata, position_R, logits_RV.shape[1])
        # The argmax of logit + Gumbel noise is a sample of the softmax.
        return jnp.where(is_greedy_R, best_R, jnp.argmax(kept_RV + noise_RV, axis=-1))

    token_R = lax.cond(is_greedy_R.all(), lambda: best_R, sample_softmax).astype(jnp.int32)
    if logprobs is None:
        return Sampled(token_R)
    logprob_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    chosen_R = jnp.take_along_axis(logprob_RV, token_R[:, None], axis=-1)[:, 0]
    if logprobs == 0:
        return Sampled(token_R, chosen_R)
    top_RL, top_token_RL = lax.top_k(logprob_RV, logprobs)
    return Sampled(token_R, chosen_R, top_token_RL.astype(jnp.int32), top_RL)


def _scale(logits_RV: Array, metadata: SamplingMetadata) -> Array:
    return logits_RV / jnp.where(metadata.temperature_R > 0, metadata.temperature_R, 1)[:, None]


def _filter(logits_RV: Array, metadata: SamplingMetadata) -> Array:
    """Apply min-p, top-k and top-p: dropped tokens get -inf. The likeliest token is always kept.

    Each filter is a threshold on the logit, so tokens of equal logits are kept or dropped together.
    """
    vocab, peak_R = logits_RV.shape[1], logits_RV.max(axis=-1)
    everything_R = jnp.full_like(peak_R, -jnp.inf)

    def find(is_active_R: Array, search: Callable[[], Array]) -> Array:
        threshold_R = lax.cond(is_active_R.any(), search, lambda: everything_R)
        return jnp.where(is_active_R, threshold_R, everything_R)

    def search_nucleus() -> Array:
        weight_RV = jnp.exp(logits_RV - peak_R[:, None])
        weight_RV = jnp.where(logits_RV >= threshold_R[:, None], weight_RV, 0)
        # A token is in the nucleus while likelier tokens do not reach top_p.
        return _find_threshold(logits_RV, weight_RV, metadata.top_p_R * weight_RV.sum(axis=-1))

    has_top_k_R = (metadata.top_k_R > 0) & (metadata.top_k_R < vocab)
    top_k_R = find(has_top_k_R, lambda: _find_threshold(logits_RV, 1, metadata.top_k_R))
    min_p_R = peak_R + jnp.log(metadata.min_p_R)  # log 0 is -inf, which keeps all
    threshold_R = jnp.maximum(min_p_R, top_k_R)
    threshold_R = jnp.maximum(threshold_R, find(metadata.top_p_R < 1, search_nucleus))
    return jnp.where(logits_RV >= jnp.minimum(threshold_R, peak_R)[:, None], logits_RV, -jnp.inf)


def _find_threshold(logits_RV: Array, weight_RV: Array | int, total_R: Array) -> Array:
    """Return the highest logit such that the weights of all logits from it upwards reach a total;
    -inf if all weights together do not.

    A binary search over the bits of the logit: sorting a vocabulary takes several times its memory,
    and cannot be part of a CUDA graph.

    Args:
        logits_RV: float32.
        weight_RV: of each token, or one number for all.
        total_R: of each row.
    """

    def reorder(bits: Array) -> Array:
        """Map the bits of a float32 to an int32 of the same order, and back."""
        return bits ^ (bits >> 31 & 0x7FFFFFFF)

    key_RV = reorder(lax.bitcast_convert_type(logits_RV, jnp.int32))

    def decide_bit(step: Array, key_R: Array) -> Array:
        higher_R = key_R ^ jnp.int32(1) << 31 - step
        sum_R = jnp.where(key_RV >= higher_R[:, None], weight_RV, 0).sum(axis=-1)
        return jnp.where(sum_R >= total_R, higher_R, key_R)

    lowest_R = jnp.full(len(logits_RV), jnp.iinfo(jnp.int32).min, jnp.int32)
    key_R = lax.fori_loop(0, 32, decide_bit, lowest_R)
    threshold_R = lax.bitcast_convert_type(reorder(key_R), logits_RV.dtype)
    return jnp.where(jnp.isnan(threshold_R), -jnp.inf, threshold_R)


def _make_noise(metadata: SamplingMetadata, position_R: Array, vocab: int) -> Array:
    """Return Gumbel noise [R, V]: a function of each row's seed, the position and the token."""
    position_R1, seed_R1, seed_high_R1 = (
        jnp.asarray(value_R).astype(jnp.uint32)[:, None]
        for value_R in (position_R, metadata.seed_R, metadata.seed_high_R)
    )
    token_RV = lax.broadcasted_iota(jnp.uint32, (len(position_R), vocab), 1)
    position_RV = jnp.broadcast_to(position_R1, token_RV.shape)
    return _make_gumbel(*threefry2x32_p.bind(seed_high_R1, seed_R1, position_RV, token_RV))


def _make_gumbel(high_RV: Array, low_RV: Array) -> Array:
    """Make Gumbel noise of 64 random bits, all that a Threefry block has.

    23 bits, as in `jax.random.gumbel`, end the noise at 16: tokens with probabilities below 1.2e-7
    would be sampled too seldom.
    """
    # The noise of likely winners comes from small numbers: they have 24 significant bits down to
    # 2**-65. Large ones must not round to 1, whose noise of -inf would drop an only candidate.
    uniform_RV = high_RV.astype(jnp.float32) * 2.0**-32
    uniform_RV += (low_RV.astype(jnp.float32) + 0.5) * 2.0**-64
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform_RV, 1 - 2.0**-24)))
