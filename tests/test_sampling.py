"""Each row is sampled by its own parameters only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from l4jax.sampling import SamplingMetadata, _filter, _make_gumbel, _make_noise, sample

V = 50


def make_metadata(rows: int, **settings) -> SamplingMetadata:
    defaults = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    values = {**defaults, **settings}
    kinds = {"temperature": "f4", "top_k": "i4", "top_p": "f4", "min_p": "f4"}
    seeds = [divmod(int(seed), 2**32) for seed in np.broadcast_to(values["seed"], rows).tolist()]
    return SamplingMetadata(
        **{
            f"{key}_R": np.broadcast_to(np.array(values[key], kind), rows)
            for key, kind in kinds.items()
        },
        seed_R=np.array([low for _, low in seeds], np.uint32),
        seed_high_R=np.array([high for high, _ in seeds], np.uint32),
    )


def make_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32)


def sample_jitted(logits, metadata, position: Any = 7, logprobs=None):
    positions = np.broadcast_to(np.array(position, np.int32), len(logits))
    return jax.jit(sample, static_argnums=3)(logits, metadata, positions, logprobs)


def find_kept(logits, **settings) -> np.ndarray:
    return np.isfinite(
        np.asarray(_filter(jnp.asarray(logits), make_metadata(len(logits), **settings)))
    )


def test_temperature_zero_is_the_likeliest_token():
    logits = make_logits(5)
    np.testing.assert_array_equal(sample_jitted(logits, make_metadata(5)).token_R, logits.argmax(1))


def test_a_row_samples_the_same_token_in_any_batch():
    logits = make_logits(6)
    settings = {
        "temperature": [0.0, 0.7, 1.0, 1.3, 0.7, 1.0],
        "top_p": [1.0, 0.9, 1.0, 0.5, 0.9, 1.0],
        "top_k": [0, 0, 5, 3, 0, 0],
        "min_p": [0.0, 0.0, 0.0, 0.1, 0.05, 0.0],
        "seed": [1, 2, 3, 4, 5, 2**32 - 1],
    }
    together = sample_jitted(logits, make_metadata(6, **settings)).token_R
    for row in range(6):
        own = {key: values[row] for key, values in settings.items()}
        alone = sample_jitted(logits[row : row + 1], make_metadata(1, **own)).token_R
        assert int(alone[0]) == int(together[row])


def test_samples_change_with_the_seed_and_with_the_position():
    logits = np.zeros((40, V), np.float32)
    by_seed = sample_jitted(logits, make_metadata(40, temperature=1.0, seed=np.arange(40))).token_R
    by_position = sample_jitted(logits, make_metadata(40, temperature=1.0), np.arange(40)).token_R
    assert len(set(by_seed.tolist())) > 15
    assert len(set(by_position.tolist())) > 15


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    rows, logits = 20000, make_logits(1)[:, :6]
    seeds = np.arange(rows)
    many = np.repeat(logits, rows, axis=0)
    tokens = np.asarray(
        sample_jitted(many, make_metadata(rows, temperature=temperature, seed=seeds)).token_R
    )
    wanted = np.exp(logits[0] / temperature) / np.exp(logits[0] / temperature).sum()
    found = np.bincount(tokens, minlength=6) / rows
    assert np.abs(found - wanted).max() < 4 * np.sqrt(0.25 / rows)


@pytest.mark.slow
def test_unlikely_tokens_are_sampled_as_often_as_they_should():
    """Tokens of probability 1e-8 in a vocabulary of Llama 4's size, in fixed rows.

    The rows are chosen among millions for a low noise of token 0, which has nearly all probability:
    this raises the number of its losses, whose Poisson distribution is known, from 1 to 11.
    """
    vocab, rows, ratio = 202_048, 600, 1e-8
    seeds = np.arange(2_000_000)
    metadata = make_metadata(len(seeds), temperature=1.0, seed=seeds)
    noise_R = np.asarray(jax.jit(_make_noise, static_argnums=2)(metadata, seeds * 0 + 7, 1))[:, 0]
    chosen = np.argsort(noise_R)[:rows]
    rate_R = (vocab - 1) * ratio * np.exp(-noise_R[chosen].astype(np.float64))
    logits_V = np.full(vocab, np.log(ratio), np.float32)
    logits_V[0] = 0

    # The tests' compiler options are for small programs.
    options = {"xla_backend_optimization_level": "3"}
    sample_few = jax.jit(sample, static_argnums=3, compiler_options=options)
    logits_RV = np.broadcast_to(logits_V, (40, vocab))
    tokens = np.concatenate(
        [
            sample_few(
                logits_RV,
                make_metadata(40, temperature=1.0, seed=seeds_R),
                np.full(40, 7, np.int32),
                None,
            ).token_R
            for seeds_R in chosen.reshape(-1, 40)
        ]
    )
    found, wanted = int((tokens > 0).sum()), rate_R.sum()
    low, high = scipy.stats.poisson.interval(0.999, wanted)
    assert 10 < wanted < 12 and low >= 2
    assert low <= found <= high


def test_the_noise_is_gumbels_down_to_the_least_likely_bits():
    rng = np.random.default_rng(0)
    high = (2.0 ** rng.uniform(0, 32, 10_000)).astype(np.uint32) - 1
    high[:6] = [0, 1, 2**31, 2**32 - 2**10, 2**32 - 2, 2**32 - 1]
    low = rng.integers(0, 2**32, high.shape, np.uint32)
    low[:1], low[5] = 0, 2**32 - 1
    found = np.asarray(_make_gumbel(jnp.asarray(high), jnp.asarray(low)), np.float64)
    uniform, rest = (
        (of_high.astype(np.longdouble) + (of_low + np.longdouble(0.5)) / 2**32) / 2**32
        for of_high, of_low in ((high, low), (~high, ~low))
    )
    wanted = -np.log(np.where(uniform < 0.5, -np.log1p(-np.minimum(uniform, 0.5)), -np.log(rest)))
    assert np.isfinite(found).all() and found.max() > 40
    # A likely token loses by small numbers, so numbers near 1 are exact to float32's 2**-24 alone.
    is_small = uniform < 0.5
    assert np.abs(found - wanted)[is_small].max() < 1e-5
    assert (np.abs(found - wanted) * rest)[~is_small & (rest > 2.0**-20)].max() < 2.0**-24


def test_seeds_that_differ_in_any_bit_sample_different_tokens():
    vocab = 100_000
    seeds = [0, *(2**bit for bit in range(64))]
    metadata = make_metadata(len(seeds), temperature=1.0, seed=np.array(seeds, np.uint64))
    tokens = sample_jitted(np.zeros((len(seeds), vocab), np.float32), metadata).token_R
    assert len(set(tokens.tolist())) == len(seeds)


def test_top_k_keeps_the_likeliest_k():
    logits = make_logits(3)
    kept = find_kept(logits, top_k=[1, 4, V + 9])
    assert kept.sum(1).tolist() == [1, 4, V]
    for row, count in enumerate((1, 4)):
        assert set(np.flatnonzero(kept[row])) == set(np.argsort(-logits[row])[:count])


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    logits = make_logits(4)
    kept = find_kept(logits, top_p=top_p)
    for row_V, kept_V in zip(logits, kept, strict=True):
        order = np.argsort(-row_V)
        probability = np.exp(row_V[order].astype(np.float64))
        probability /= probability.sum()
        count = V if top_p == 1 else int(np.searchsorted(np.cumsum(probability), top_p) + 1)
        assert set(np.flatnonzero(kept_V)) == set(order[:count])


def test_min_p_keeps_what_is_at_least_that_fraction_of_the_likeliest():
    logits = make_logits(4)
    kept = find_kept(logits, min_p=0.2)
    ratio = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_array_equal(kept, ratio >= 0.2)


def test_top_p_counts_within_what_top_k_left():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    # The first two have 4/7 and 3/7 of their sum: the first alone reaches 0.5.
    assert find_kept(logits, top_k=2, top_p=0.5).tolist() == [[True, False, False, False]]
    assert find_kept(logits, top_k=2, top_p=0.6).tolist() == [[True, True, False, False]]


def test_a_row_without_filters_keeps_all_tokens_in_a_batch_with_filters():
    """Even tokens so unlikely that the others sum to 1 in float32."""
    logits = make_logits(3) * 20
    kept = find_kept(logits, top_k=[0, 3, V], top_p=[1.0, 1.0, 0.5])
    assert kept.sum(1)[:2].tolist() == [V, 3]


def test_filters_treat_equal_logits_alike_and_keep_no_forbidden_token():
    logits = np.full((4, V), -np.inf, np.float32)
    logits[:, :6] = [-3, 2, 2, 0, -1, 2]
    kept = find_kept(logits, top_k=[2, 0, 0, 5], top_p=[1.0, 0.1, 1.0, 1.0], min_p=[0, 0, 0.1, 0])
    assert [np.flatnonzero(row).tolist() for row in kept] == [
        *([[1, 2, 5]] * 2),
        [1, 2, 3, 5],
        [1, 2, 3, 4, 5],
    ]


def test_logprobs_are_those_of_the_unfiltered_model():
    logits = make_logits(3)
    found = sample_jitted(
        logits, make_metadata(3, temperature=0.3, top_k=2, seed=[1, 2, 3]), logprobs=5
    )
    wanted = np.asarray(jax.nn.log_softmax(logits))
    for row in range(3):
        assert float(found.logprob_R[row]) == pytest.approx(
            wanted[row, int(found.token_R[row])], abs=1e-5
        )
        order = np.argsort(-wanted[row])[:5]
        np.testing.assert_array_equal(found.top_token_RL[row], order)
        np.testing.assert_allclose(found.top_logprob_RL[row], wanted[row, order], atol=1e-5)


def test_only_requested_logprobs_are_reported():
    logits = make_logits(2)
    nothing, chosen = (
        sample_jitted(logits, make_metadata(2)),
        sample_jitted(logits, make_metadata(2), logprobs=0),
    )
    assert [value is None for value in dataclasses.astuple(nothing)] == [False, True, True, True]
    assert [value is None for value in dataclasses.astuple(chosen)] == [False, False, True, True]
