"""Laws of the reference: its parts agree with each other and with the goldens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import write_goldens
from tests import tiers, weights
from tests.reference import oracle

TOLERANCE = 2e-4  # of logits whose standard deviation is 4; measured: 4e-5
KINDS: tuple[weights.Kind, ...] = ("scout", "maverick")


@pytest.fixture(scope="module")
def models() -> dict[str, oracle.Model]:
    return {kind: oracle.build(weights.tiny_config(kind), seed=0) for kind in KINDS}


def _image_prompt() -> tuple[np.ndarray, np.ndarray]:
    """Make a prompt whose second tile crosses the chunk boundaries at 16 and 32."""
    ids = weights.random_ids(36, seed=2)
    parts = [ids[:8], weights.image_ids(1, 2), ids[8:23], weights.image_ids(1, 1), ids[23:]]
    return np.concatenate(parts), weights.random_pixels(4, seed=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_text_only", [False, True])
def test_tensor_shapes_equal_the_references(kind: weights.Kind, is_text_only: bool) -> None:
    config = weights.tiny_config(kind, num_hidden_layers=8)
    expected = oracle.shapes(oracle.build(config, seed=0))
    if is_text_only:
        config, prefix = weights.text_only(config), "language_model."
        expected = {
            name.removeprefix(prefix): shape
            for name, shape in expected.items()
            if name.startswith(prefix)
        }
    assert weights.tensor_shapes(config) == expected


@pytest.mark.parametrize(("kind", "chunk"), tiers.pairs(KINDS, [8, 32]))
def test_prefill_equals_decode_over_three_chunks(kind: weights.Kind, chunk: int) -> None:
    config = weights.tiny_config(kind, attention_chunk_size=chunk, num_hidden_layers=8)
    model = oracle.build(config, seed=1)
    ids = weights.random_ids(3 * chunk + 5, seed=1)
    prefill = oracle.logits(model, ids)
    assert prefill.shape == (len(ids), 320)
    assert 2 < prefill.std() < 8
    decoded = oracle.decode(model, ids, steps=2 * chunk + 3)
    np.testing.assert_allclose(decoded, prefill, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_equals_decode_after_images(
    kind: weights.Kind, models: dict[str, oracle.Model]
) -> None:
    ids, pixels = _image_prompt()
    prefill = oracle.logits(models[kind], ids, pixels)
    decoded = oracle.decode(models[kind], ids, 10, pixels)
    np.testing.assert_allclose(decoded, prefill, atol=TOLERANCE, rtol=0)
    other = oracle.logits(models[kind], ids, weights.random_pixels(4, seed=4))
    assert np.abs(other - prefill)[20].max() > 0.1  # the image changes the logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [False, True])
def test_saved_model_is_loaded_unchanged(
    kind: weights.Kind, sharded: bool, models: dict[str, oracle.Model], tmp_path: Path
) -> None:
    oracle.save(models[kind], tmp_path, sharded=sharded)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ids, pixels = _image_prompt()
    np.testing.assert_array_equal(
        oracle.logits(oracle.load(tmp_path), ids, pixels), oracle.logits(models[kind], ids, pixels)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["published", "transformers5"])
@pytest.mark.parametrize(("dtype", "shards"), [("F32", 1), ("BF16", 3)])
def test_written_checkpoint_has_the_weights_of_its_seed(
    kind: weights.Kind,
    style: weights.Style,
    dtype: Any,
    shards: int,
    models: dict[str, oracle.Model],
    tmp_path: Path,
) -> None:
    config = weights.tiny_config(kind, style=style)
    weights.write_checkpoint(tmp_path, config, seed=0, dtype=dtype, shards=shards)
    ids, pixels = _image_prompt()
    np.testing.assert_array_equal(
        oracle.logits(oracle.load(tmp_path), ids, pixels), oracle.logits(models[kind], ids, pixels)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_transformers5_style_equals_the_saved_config(
    kind: weights.Kind, models: dict[str, oracle.Model], tmp_path: Path
) -> None:
    oracle.save(models[kind], tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    ours = weights.tiny_config(kind, style="transformers5")
    for config in (saved, ours):
        del config["transformers_version"]
        for section in (config, config["text_config"], config["vision_config"]):
            section.pop("dtype", None)  # the dtype of the file's tensors
    assert ours == saved


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("scout", {"attention_chunk_size": 16}),
        ("scout", {"attn_temperature_tuning": False}),
        ("scout", {"floor_scale": 9}),
        ("scout", {"no_rope_layers": [1, 1, 0, 1, 1]}),
        ("scout", {"rope_scaling": None}),
        ("scout", {"rope_theta": 10000.0}),
        ("scout", {"use_qk_norm": False}),
        ("scout", {"vision_config": {"rope_theta": 100}}),
        ("maverick", {"attn_scale": 0.2}),
        ("maverick", {"rope_theta": 10000.0}),
        ("maverick", {"use_qk_norm": True}),
    ],
)
def test_every_setting_changes_the_logits(
    kind: weights.Kind, change: dict[str, Any], models: dict[str, oracle.Model]
) -> None:
    """Tests would not notice an ignored setting that changes no logits of the tiny models."""
    ids, pixels = _image_prompt()
    changed = oracle.build(weights.tiny_config(kind, **change), seed=0)
    difference = oracle.logits(changed, ids, pixels) - oracle.logits(models[kind], ids, pixels)
    assert np.abs(difference[-1]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_submodule_cases_are_consistent(
    kind: weights.Kind, models: dict[str, oracle.Model]
) -> None:
    model = models[kind]
    ids, pixels = _image_prompt()
    cases = oracle.submodule_cases(model, ids, pixels)
    assert ("dense" in cases) == (kind == "maverick")
    tensors = weights.random_tensors(oracle.shapes(model), seed=0)
    for case in cases.values():
        assert any(name.startswith(case.module + ".") for name in tensors)
        assert case.input.dtype == case.output.dtype == np.float32
    text = ("attention_local", "attention_global", "norm", "layer", "moe")
    assert {cases[name].output.shape for name in text} == {(len(ids), 64)}
    np.testing.assert_array_equal(cases["vision"].output, cases["vision_adapter"].output)
    np.testing.assert_array_equal(cases["projector"].output, oracle.image_features(model, pixels))
    assert cases["vision_layer"].input.shape == (4, 17, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_moe_scales_the_input_of_the_chosen_expert(
    kind: weights.Kind, models: dict[str, oracle.Model]
) -> None:
    """The expectation is y = shared(x) + expert(sigmoid(score) * x) in numpy."""

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    cases = oracle.submodule_cases(models[kind], weights.random_ids(29, seed=5))
    moe, score_TE = cases["moe"], cases["router"].output
    tensors = weights.random_tensors(oracle.shapes(models[kind]), seed=0)
    weight = {
        name.removeprefix(moe.module + "."): tensor
        for name, tensor in tensors.items()
        if name.startswith(moe.module)
    }
    np.testing.assert_allclose(moe.input @ weight["router.weight"].T, score_TE, atol=1e-4)
    chosen_T = score_TE.argmax(-1)
    assert len(set(chosen_T.tolist())) > 1
    gate, up, down = (weight[f"shared_expert.{x}_proj.weight"].T for x in ("gate", "up", "down"))
    for x_D, y_D, score_E, expert in zip(moe.input, moe.output, score_TE, chosen_T, strict=True):
        scaled_D = x_D / (1 + np.exp(-score_E[expert]))
        gate_F, up_F = np.split(scaled_D @ weight["experts.gate_up_proj"][expert], 2)
        routed_D = (silu(gate_F) * up_F) @ weight["experts.down_proj"][expert]
        shared_D = (silu(x_D @ gate) * (x_D @ up)) @ down
        np.testing.assert_allclose(y_D, shared_D + routed_D, atol=1e-4)


@pytest.mark.parametrize("name", tiers.every(3, weights.GOLDENS))
def test_golden_equals_the_reference(name: str) -> None:
    golden = weights.read_golden(name)
    computed = write_goldens.compute(name, write_goldens.PROMPT_SEEDS[name])
    stored = dict(np.load(weights.GOLDEN_FOLDER / f"{name}.npz"))
    assert write_goldens.is_same(computed, stored)
    assert golden.greedy_margins.min() > 100 * TOLERANCE
