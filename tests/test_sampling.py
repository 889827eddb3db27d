"""Each row is sampled by its own parameters only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.sampling import SamplingMetadata, _filter, sample

V = 50


def make_metadata(rows: int, **settings) -> SamplingMetadata:
    defaults = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    values = {**defaults, **settings}
    kinds = {"temperature": "f4", "top_k": "i4", "top_p": "f4", "min_p": "f4", "seed": "u4"}
    return SamplingMetadata(
        **{
            f"{key}_R": np.broadcast_to(np.array(values[key], kind), rows)
            for key, kind in kinds.items()
        }
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
