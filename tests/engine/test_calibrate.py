"""Calibrated scales of an fp8 cache: powers of two with room for twice the measured values."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, cache
from l4jax.config import TINY
from l4jax.engine import calibrate
from l4jax.engine.config import CapacityError, EngineConfig
from l4jax.engine.runner import Runner
from l4jax.kernels import PORTABLE, Kernels, reference
from l4jax.kernels.formats import FP8
from l4jax.model import Llama4
from l4jax.testing import write_model
from tests import models
from tests.engine.engines import get_pool, load_runner
from tests.engine.test_fp8_cache import compute_logits

CALCULATED = EngineConfig(
    max_model_len=64, block_size=4, kv_cache_dtype="fp8", calculate_kv_scales=True
)


def find_scales(runner: Runner) -> tuple[np.ndarray, np.ndarray]:
    """Return the calibrated scales of a runner's pool."""
    runner.allocate_kv_cache(CALCULATED)
    pool = get_pool(runner)
    assert pool.k_scale is not None and pool.v_scale is not None
    return np.asarray(pool.k_scale), np.asarray(pool.v_scale)


def choose_scales(largest: np.ndarray) -> np.ndarray:
    """Return the least power of two s with 448 s >= 2 largest."""
    return np.float32(2) ** np.ceil(np.log2(largest * 2 / 448))


@pytest.mark.parametrize("name", ["scout-8-text", "maverick-32-text"])
def test_scales_are_those_of_the_keys_and_values_that_are_stored(name):
    """Compared with keys and values as the attention kernel gets them, before they are cached."""
    tiny, _ = models.load_golden(name)
    text = tiny.config.text
    batch = jax.tree.map(jnp.asarray, calibrate.make_batch(tiny.config, 4, 1))
    pool = cache.make_pool(text, 4 * batch.tables.global_RB.size, 4, jnp.float32)

    largest = []

    def attend(*projected_and_pool):
        _, *stored = reference.project_heads(*projected_and_pool[:4])
        found = [jnp.abs(x).max() for x in stored]
        jax.debug.callback(lambda *kv: largest.append(kv), *found, ordered=True)
        return PORTABLE.attend(*projected_and_pool)

    model = Llama4(text, Kernels(attend=attend))
    jax.jit(model.apply)({"params": tiny.params["text"]}, batch, pool)
    jax.effects_barrier()
    assert len(largest) == text.layers
    found = find_scales(load_runner(name, "1"))
    np.testing.assert_array_equal(found, choose_scales(np.array(largest).T))


def test_calibration_prompts_begin_with_bos_and_stay_within_a_chunk():
    tiny, _ = models.load_golden("scout-8-text")
    for shards in (1, 2):
        batch = calibrate.make_batch(tiny.config, 4, shards)
        assert batch.token_T.shape == (shards * calibrate.TOKENS,)
        assert (batch.token_T[::8] == tiny.config.bos_id).all()
        assert len(set(batch.token_T.tolist())) > 100
        assert batch.position_T.max() == 7
        pages = np.concatenate([batch.tables.global_RB[None], batch.tables.local_GRB])
        once = np.split(pages, shards, axis=1)
        assert sorted(once[0].ravel()) == list(range(4 * 64 * 2))
        assert all((part == once[0]).all() for part in once)


@pytest.mark.slow
def test_scales_are_the_same_on_every_mesh_and_for_every_page():
    wanted = find_scales(load_runner("scout-8-text", "1"))
    for mesh in ("8", "2x4"):
        found = find_scales(load_runner("scout-8-text", mesh))
        np.testing.assert_array_equal(found, wanted)
    runner = load_runner("scout-8-text", "1")
    runner.allocate_kv_cache(dataclasses.replace(CALCULATED, block_size=8))
    np.testing.assert_array_equal(get_pool(runner).k_scale, wanted[0])


def test_the_checkpoints_scales_come_first_and_the_default_is_one(monkeypatch):
    runner = load_runner("scout-8-text", "1")
    stored = np.full((2, runner.config.text.layers), 0.25, np.float32)
    monkeypatch.setattr(runner, "kv_scales", tuple(stored))
    np.testing.assert_array_equal(find_scales(runner), stored)
    monkeypatch.setattr(runner, "kv_scales", None)
    assert (np.array(find_scales(runner)) < 0.1).all()
    runner.allocate_kv_cache(dataclasses.replace(CALCULATED, calculate_kv_scales=False))
    np.testing.assert_array_equal(get_pool(runner).k_scale, 1)


def test_layers_of_zeros_have_the_scale_one_and_powers_of_two_are_not_doubled():
    found = calibrate.choose_scales(np.array([0, 224, 225, 112, 1e-3, 7e4], np.float32))
    np.testing.assert_array_equal(found, [1, 1, 2, 0.5, 2.0**-17, 512])
    assert found.dtype == np.float32


def scale_keys_and_values(tiny: models.Tiny, factor: float) -> models.Tiny:
    """Multiply keys and values by a factor, divide queries and the output projection by it."""

    def change(attention):
        each_J = jnp.full(attention["qkv"].shape[1], 1 / factor).at[-2:].set(factor)
        qkv_KJHD = attention["qkv"] * each_J[:, None, None]
        return {**attention, "qkv": qkv_KJHD, "out": attention["out"] / factor}

    text = {
        name: part if "layer" not in name else {**part, "attention": change(part["attention"])}
        for name, part in tiny.params["text"].items()
    }
    return models.Tiny(tiny.config, {**tiny.params, "text": text})


@functools.cache
def measure(factor: float) -> dict[str, tuple[float, float]]:
    """Return KL divergence from a float32 cache, and top-1 agreement, without and with scales."""
    tiny, golden = models.load_golden(
        "maverick-32-text"
    )  # no q/k norm, which would undo the factor
    changed = scale_keys_and_values(tiny, factor)
    runner = load_runner("maverick-32-text", "1")
    plain, runner.params = runner.params, changed.params
    scales = find_scales(runner)
    runner.params = plain
    wanted = np.asarray(jax.nn.log_softmax(compute_logits(changed, golden.ids, jnp.float32)))
    found: dict[str, tuple[float, float]] = {}
    for name, given in (("one", None), ("calculated", scales)):
        logits = compute_logits(changed, golden.ids, FP8, given)
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        kl = (np.exp(wanted) * (wanted - logprobs)).sum(-1).mean()
        found[name] = float(kl), float((wanted.argmax(-1) == logprobs.argmax(-1)).mean())
    return found


@pytest.mark.parametrize("factor", [2.0**10, 2.0**-10])
def test_scales_keep_keys_and_values_within_the_range_of_e4m3(factor):
    """Times 1024, most values exceed 448; over 1024, most are below e4m3's smallest step. With
    scales the results have the same bits as at factor 1."""
    assert measure(factor)["calculated"] == measure(1.0)["calculated"]
    (kl, same), (kl_one, same_one) = measure(factor)["calculated"], measure(factor)["one"]
    assert kl_one > 10 * kl and same_one < same - 0.5


def test_scales_cost_no_accuracy_where_one_suffices():
    (kl, same), (kl_one, same_one) = measure(1.0)["calculated"], measure(1.0)["one"]
    assert kl < 1.05 * kl_one and same > same_one - 0.05


def test_scales_of_a_cache_that_is_not_fp8_are_refused():
    with pytest.raises(CapacityError, match=r"calculate_kv_scales is for an fp8 cache, .* 'auto'"):
        EngineConfig(calculate_kv_scales=True)


@pytest.mark.parametrize(
    ("is_calculated", "says"), [(False, "uses 1: .*--calculate-kv-scales"), (True, "512 random")]
)
def test_the_source_of_scales_is_reported(is_calculated, says, tmp_path, capfd):
    write_model(tmp_path / "tiny", TINY)
    llm = LLM(
        tmp_path / "tiny",
        max_model_len=64,
        kv_cache_dtype="fp8",
        calculate_kv_scales=is_calculated,
    )
    assert (np.asarray(get_pool(llm.engine.runner).k_scale) == 1).all() != is_calculated
    assert re.search(says, capfd.readouterr().err)
