"""Calculated scales of an fp8 cache equal those of Hugging Face's keys and values."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama4 import modeling_llama4

from l4jax.engine import calibrate
from tests import weights
from tests.engine.engines import load_runner
from tests.engine.test_calibrate import choose_scales, find_scales
from tests.reference import oracle


@pytest.mark.parametrize("name", ["scout-8-text", "scout-32-text", "maverick-32-text"])
def test_calculated_scales_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference records the largest keys, after RoPE and norm, and values of all prompts."""
    golden, runner = weights.read_golden(name), load_runner(name, "1")
    model, layers = oracle.build(golden.config, golden.weights_seed), runner.config.text.layers
    largest = np.zeros((2, layers), np.float32)
    attend = modeling_llama4.eager_attention_forward

    def record(module: Any, query: torch.Tensor, *key_value: Any, **rest):
        i = module.layer_idx
        found = [float(tensor.abs().max()) for tensor in key_value[:2]]
        largest[:, i] = np.maximum(largest[:, i], found)
        return attend(module, query, *key_value, **rest)

    monkeypatch.setattr(modeling_llama4, "eager_attention_forward", record)
    batch = calibrate.make_batch(runner.config, 4, 1)
    for prompt in batch.token_T.reshape(-1, runner.config.text.chunk):
        oracle.logits(model, prompt)
    np.testing.assert_array_equal(find_scales(runner), choose_scales(largest))
