"""Checkpoints saved by transformers are loaded with equal tensors and equal logits."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import SingleDeviceSharding

from l4jax import checkpoint
from l4jax.checkpoint.parameters import flatten
from l4jax.inputs import read_generation_config
from tests import models, weights
from tests.checkpoint.published import arrange
from tests.reference import oracle
from tests.test_model import assert_close


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_checkpoint_saved_by_transformers_is_loaded(
    kind: weights.Kind, sharded: bool, tmp_path: Path
) -> None:
    model = oracle.build(weights.tiny_config(kind), 2)
    oracle.save(model, tmp_path, sharded=sharded)
    config = checkpoint.load_config(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = arrange(tensors, config)
    loaded = checkpoint.load(
        tmp_path,
        config,
        np.float32,
        lambda _: SingleDeviceSharding(jax.devices()[0]),
        progress=False,
    )
    found = flatten(loaded)
    assert set(found) == set(expected)
    for path, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), expected[path], err_msg=path)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_bf16_checkpoint_saved_by_transformers_gives_its_logits(
    kind: weights.Kind, tmp_path: Path
) -> None:
    """The weights are exact in bfloat16; both sides compute with them in float32."""
    model, ids = oracle.build(weights.tiny_config(kind), 3), weights.random_ids(40, 3)
    wanted = oracle.logits(model, ids)
    for parameter in model.parameters():  # not buffers: see the note on `model.to` in oracle.py
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    oracle.save(model, tmp_path, sharded=True)
    assert checkpoint.choose_dtype(tmp_path) == "bfloat16"
    config, here = checkpoint.load_config(tmp_path), SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load(tmp_path, config, np.float32, lambda _: here, progress=False)
    assert_close(models.run_in_pieces(models.Tiny(config, params), ids, [9]), wanted)


def test_files_that_transformers_writes_by_default_are_read(tmp_path: Path) -> None:
    """Every key is written, the defaults too."""
    raw = weights.tiny_config("scout")
    whole: Any = oracle.as_hf_config(raw)
    for config, expected in ((whole, raw), (whole.text_config, weights.text_only(raw))):
        for use_diff in (True, False):
            found = json.loads(config.to_json_string(use_diff=use_diff))
            assert checkpoint.parse_config(found) == checkpoint.parse_config(expected)
    generation = tmp_path / "generation_config.json"
    generation.write_text(transformers.GenerationConfig().to_json_string(use_diff=False))
    assert read_generation_config(tmp_path) == {}


def test_text_only_checkpoint_saved_by_transformers_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(4)
    config: Any = oracle.as_hf_config(weights.tiny_config("maverick")).text_config
    model: Any = transformers.Llama4ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ours, here = checkpoint.load_config(tmp_path), SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load(tmp_path, ours, np.float32, lambda _: here, progress=False)
    assert ours.vision is None
    np.testing.assert_array_equal(
        np.asarray(flatten(params)["text/embedding"]),
        model.get_input_embeddings().weight.detach().float().numpy(),
    )
