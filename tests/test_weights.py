"""Laws of the seeded checkpoints; they hold without torch."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import weights


def _load(folder: Path) -> weights.Tensors:
    tensors: weights.Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("name", weights.GOLDENS)
def test_golden_has_the_weights_of_its_seed(name: str) -> None:
    golden = weights.read_golden(name)  # raises if the weights differ
    chunk = golden.config["text_config"]["attention_chunk_size"]
    boundaries = {t for t in range(len(golden.ids)) if t % chunk in (0, chunk - 1)}
    assert boundaries <= set(golden.rows.tolist())
    assert len(golden.ids) > 3 * chunk
    has_image = name.endswith("-image")
    assert (golden.pixels is not None) == (golden.image_features is not None) == has_image
    patches = golden.ids == weights.PATCH_ID
    if golden.image_features is not None:
        assert len(golden.image_features) == patches.sum() == 12
        assert patches[31] and patches[32]  # one tile, two chunks
    else:
        assert not patches.any()


def test_weights_depend_on_name_and_seed_only() -> None:
    config = weights.tiny_config("scout")
    whole = weights.random_tensors(weights.tensor_shapes(config), seed=3)
    text = weights.random_tensors(weights.tensor_shapes(weights.text_only(config)), seed=3)
    for name, tensor in text.items():
        np.testing.assert_array_equal(tensor, whole["language_model." + name])
    other = weights.random_tensors(weights.tensor_shapes(config), seed=4)
    assert not any(np.array_equal(other[name], tensor) for name, tensor in whole.items())


def test_no_tensor_is_trivial() -> None:
    shapes = weights.tensor_shapes(weights.tiny_config("maverick"))
    for name, tensor in weights.random_tensors(shapes, seed=0).items():
        assert tensor.std() > 0.03, name
        assert np.unique(tensor).size > tensor.size / 100, name


def test_dtypes_and_shards_hold_the_same_numbers(tmp_path: Path) -> None:
    config = weights.tiny_config("maverick")
    weights.write_checkpoint(tmp_path / "whole", config, seed=0)
    weights.write_checkpoint(tmp_path / "shards", config, seed=0, dtype="BF16", shards=4)
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    whole, shards = _load(tmp_path / "whole"), _load(tmp_path / "shards")
    assert whole.keys() == shards.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in shards.values())
    for name, tensor in whole.items():
        assert tensor.dtype == np.float32
        assert shards[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(shards[name].astype(np.float32), tensor)


def test_unfused_experts_are_transposed_fused_experts(tmp_path: Path) -> None:
    config = weights.tiny_config("scout")
    weights.write_checkpoint(tmp_path, config, seed=0, fused=False)
    unfused, fused = _load(tmp_path), weights.random_tensors(weights.tensor_shapes(config), seed=0)
    experts = "language_model.model.layers.2.feed_forward.experts."
    gate_up, down = fused[experts + "gate_up_proj"], fused[experts + "down_proj"]
    for k in range(4):
        gate, up = (unfused[f"{experts}{k}.{name}_proj.weight"] for name in ("gate", "up"))
        np.testing.assert_array_equal(np.concatenate([gate, up]).T, gate_up[k])
        np.testing.assert_array_equal(unfused[f"{experts}{k}.down_proj.weight"].T, down[k])
    assert not any(tensor.ndim == 3 for tensor in unfused.values())


def test_unknown_override_is_refused() -> None:
    with pytest.raises(KeyError, match="chunk_size"):
        weights.tiny_config("scout", chunk_size=8)


def test_image_ids_follow_the_published_order() -> None:
    x, y, patch = weights.TILE_X_SEPARATOR_ID, weights.TILE_Y_SEPARATOR_ID, [weights.PATCH_ID] * 4
    begin, end = weights.BEGIN_OF_IMAGE_ID, weights.END_OF_IMAGE_ID
    row = [*patch, x, *patch, y]
    whole = [weights.IMAGE_ID, *patch, end]
    assert weights.image_ids(1, 1).tolist() == [begin, *whole]
    assert weights.image_ids(2, 2).tolist() == [begin, *row, *row, *whole]
