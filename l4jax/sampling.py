"""From logits to a token, for each row by its own settings, whatever else is in the batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from l4jax import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingMetadata:
    """How each row is sampled, as vLLM's `SamplingParams` means it. Numpy or arrays."""

    temperature_R: Any  # float32; 0 is greedy
    top_k_R: Any  # int32; 0 keeps all
    top_p_R: Any  # float32; 1 keeps all
    min_p_R: Any  # float32; 0 keeps all
    seed_R: Any  # uint32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """A token of each row, with log-probabilities where asked for.

    Log-probabilities are of the model's own distribution, before temperature and filters.
    """

    token_R: Array  # int32
    logprob_R: Array | None = None  # float32, of that token
    top_token_RL: Array | None = None  # int32, the likeliest first
    top_logprob_RL: Array | None = None  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitsProcessors:
    """What changes each row's logits before a token is drawn. Numpy or arrays.

    `seen_SV` counts, for each slot, how often the answer holds each token, and has `IN_PROMPT`
    added where the prompt holds it.
    """

    slot_R: Any  # int32, of the row in seen_SV; beyond it is none
    presence_R: Any  # float32
    frequency_R: Any  # float32
    repetition_R: Any  # float32; 1 changes nothing
    bias_token_RL: Any  # int32; -1 is unused
    bias_RL: Any  # float32, added to those tokens
    floor_R: Any  # int32 position before which none of stop_RL is drawn
    stop_RL: Any  # int32; -1 is unused
    allowed_RL: Any  # int32 [R, vocab / 32]: bit i of word w is token 32 w + i


IN_PROMPT = 1 << 30  # far above any count

_ROW, _LIST = (axes.ROWS,), (axes.ROWS, axes.LIST)
SAMPLING_METADATA_AXES = SamplingMetadata(*[_ROW] * 5)
LOGITS_PROCESSORS_AXES = LogitsProcessors(_ROW, _ROW, _ROW, _ROW, _LIST, _LIST, _ROW, _LIST, _LIST)


def apply_logits_processors(
    logits_RV: Array, seen_SV: Array, adjustments: LogitsProcessors, position_R: Array
) -> Array:
    """Logits after penalties, biases, and what is forbidden: -inf.

    Penalties are vLLM's: repetition divides positive logits and multiplies others, of tokens in
    prompt or answer; frequency and presence look at the answer only.

    Args:
        logits_RV: float32.
        seen_SV: int32, what prompt and answer hold.
        adjustments: of each row.
        position_R: int32 position that the drawn token will take.
    """
    a = adjustments

    def penalize(logits_RV: Array) -> Array:
        seen_RV = seen_SV.at[a.slot_R].get(mode="fill", fill_value=0)
        count_RV = seen_RV & (IN_PROMPT - 1)
        repetition_RV = jnp.where(seen_RV > 0, a.repetition_R[:, None], 1.0)
        logits_RV = jnp.where(logits_RV > 0, logits_RV / repetition_RV, logits_RV * repetition_RV)
        return (
            logits_RV - a.frequency_R[:, None] * count_RV - a.presence_R[:, None] * (count_RV > 0)
        )

    def put(logits_RV: Array, token_RL: Array, value_RL: Array) -> Array:
        """Add to the logits of listed tokens; those at -1 go beyond the vocabulary, to nowhere."""
        vocab = logits_RV.shape[1]
        token_RL = jnp.where(token_RL >= 0, token_RL, vocab)
        return jax.vmap(lambda row, at, value: row.at[at].add(value, mode="drop"))(
            logits_RV, token_RL, value_RL
        )

    has_penalties = ((a.presence_R != 0) | (a.frequency_R != 0) | (a.repetition_R != 1)).any()
    logits_RV = lax.cond(has_penalties, penalize, lambda x: x, logits_RV)
    logits_RV = put(logits_RV, a.bias_token_RL, a.bias_RL)
    is_early_R = position_R < a.floor_R
    stop_RL = jnp.where(is_early_R[:, None], a.stop_RL, -1)
    logits_RV = put(logits_RV, stop_RL, jnp.full(stop_RL.shape, -jnp.inf))
    bits = jnp.arange(32)
    allowed_RV = (a.allowed_RL[:, :, None] >> bits & 1).reshape(len(a.allowed_RL), -1)
    return jnp.where(allowed_RV[:, : logits_RV.shape[1]] == 1, logits_RV, -jnp.inf)


def sample(
    logits_RV: Array,
    controls: SamplingMetadata,
    position_R: Array,
    logprobs: int | None,
    adjusted_RV: Array | None = None,
) -> Sampled:
    """Draw a token for each row.

    The draw depends on the row's logits, its settings, its seed and the token's position, and on
    nothing else: the same request with the same seed gives the same tokens in any batch.

    Args:
        logits_RV: float32.
        controls: settings of each row.
        position_R: int32 position that the drawn token will take.
        logprobs: how many of the likeliest tokens to report; 0 reports the drawn one only, None
            nothing.
        adjusted_RV: what to draw from instead; what is reported stays the model's own.
    """
    from_RV = logits_RV if adjusted_RV is None else adjusted_RV
    is_greedy_R = controls.temperature_R <= 0
    best_R = jnp.argmax(from_RV, axis=-1)

    def draw() -> Array:
        kept_RV = _filter(_warm(from_RV, controls), controls)
        noise_RV = jax.vmap(_make_noise, (0, 0, None))(
            controls.seed_R, position_R, logits_RV.shape[1]
        )
        # The largest of logit + Gumbel noise is a draw from the softmax.
        return jnp.where(is_greedy_R, best_R, jnp.argmax(kept_RV + noise_RV, axis=-1))

    token_R = lax.cond(is_greedy_R.all(), lambda: best_R, draw).astype(jnp.int32)
    if logprobs is None:
        return Sampled(token_R)
    logprob_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    drawn_R = jnp.take_along_axis(logprob_RV, token_R[:, None], axis=-1)[:, 0]
    if logprobs == 0:
        return Sampled(token_R, drawn_R)
    top_RL, top_token_RL = lax.top_k(logprob_RV, logprobs)
    return Sampled(token_R, drawn_R, top_token_RL.astype(jnp.int32), top_RL)


def _warm(logits_RV: Array, controls: SamplingMetadata) -> Array:
    return logits_RV / jnp.where(controls.temperature_R > 0, controls.temperature_R, 1)[:, None]


def _filter(logits_RV: Array, controls: SamplingMetadata) -> Array:
    """Keep what min-p, then top-k, then top-p keep; the rest becomes -inf. The likeliest token
    always stays.

    Each filter is a threshold on the logit, so that tokens of equal logit stay or go together.
    """
    vocab, peak_R = logits_RV.shape[1], logits_RV.max(axis=-1)
    everything_R = jnp.full_like(peak_R, -jnp.inf)

    def find(is_wanted_R: Array, search: Callable[[], Array]) -> Array:
        found_R = lax.cond(is_wanted_R.any(), search, lambda: everything_R)
        return jnp.where(is_wanted_R, found_R, everything_R)

    def search_nucleus() -> Array:
        weight_RV = jnp.exp(logits_RV - peak_R[:, None])
        weight_RV = jnp.where(logits_RV >= floor_R[:, None], weight_RV, 0)
        # A token is in it while those likelier than it do not reach top_p.
        return _find_floor(logits_RV, weight_RV, controls.top_p_R * weight_RV.sum(axis=-1))

    is_ranked_R = (controls.top_k_R > 0) & (controls.top_k_R < vocab)
    last_R = find(is_ranked_R, lambda: _find_floor(logits_RV, 1, controls.top_k_R))
    floor_R = jnp.maximum(peak_R + jnp.log(controls.min_p_R), last_R)  # log 0 is -inf: keeps all
    floor_R = jnp.maximum(floor_R, find(controls.top_p_R < 1, search_nucleus))
    return jnp.where(logits_RV >= jnp.minimum(floor_R, peak_R)[:, None], logits_RV, -jnp.inf)


def _find_floor(logits_RV: Array, weight_RV: Array | int, wanted_R: Array) -> Array:
    """The highest logit from which on upwards the weights, or one for all, add up to what is
    wanted; -inf where not even all of them do.

    Found bit by bit, and not in the sorted logits: sorting a vocabulary takes several times its
    memory, and is nothing that a CUDA graph could hold.
    """

    def turn(bits: Array) -> Array:
        """From a float's bits to an integer of the same order among all of them, and back."""
        return bits ^ (bits >> 31 & 0x7FFFFFFF)

    key_RV = turn(lax.bitcast_convert_type(logits_RV, jnp.int32))

    def decide(at: Array, floor_R: Array) -> Array:
        higher_R = floor_R ^ jnp.int32(1) << 31 - at
        found_R = jnp.where(key_RV >= higher_R[:, None], weight_RV, 0).sum(axis=-1)
        return jnp.where(found_R >= wanted_R, higher_R, floor_R)

    lowest_R = jnp.full(len(logits_RV), jnp.iinfo(jnp.int32).min)
    key_R = lax.fori_loop(0, 32, decide, lowest_R)
    floor_R = lax.bitcast_convert_type(turn(key_R), logits_RV.dtype)
    return jnp.where(jnp.isnan(floor_R), -jnp.inf, floor_R)


def _make_noise(seed: Array, position: Array, vocab: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)
