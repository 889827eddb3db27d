"""Tokens and logprobs beyond 8192 positions, with the published chunk, scaling and tuning."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from l4jax import checkpoint
from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.request import SamplingParams
from l4jax.engine.runner import Runner
from tests import weights
from tests.reference import oracle

CHUNK = 8192
TOKENS = 12


def make_raw() -> dict:
    scaling = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    return weights.tiny_config(
        "scout",
        attention_chunk_size=CHUNK,
        floor_scale=CHUNK,
        max_position_embeddings=4 * CHUNK,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=500000.0,
        rope_scaling={
            **scaling,
            "original_max_position_embeddings": CHUNK,
            "rope_type": "llama3",
        },
    )


@pytest.fixture(scope="module")
def engine():
    with tempfile.TemporaryDirectory() as folder:
        weights.write_checkpoint(folder, make_raw(), 0)
        runner = Runner(checkpoint.load_config(folder), "1", "float32")
        runner.load(Path(folder), progress=False)
    engine_config = EngineConfig(
        max_model_len=2 * CHUNK + 200, max_num_seqs=1, max_num_batched_tokens=2048
    )
    return Engine(runner, engine_config)


@pytest.fixture(scope="module")
def model():
    built = oracle.build(make_raw(), 0)
    built.set_attn_implementation("sdpa")  # eager attention would hold 16,000 x 16,000 scores
    return built


@pytest.mark.slow
@pytest.mark.parametrize(
    "length",
    [CHUNK, 2 * CHUNK - 5, 2 * CHUNK + 50],
    ids=["prompt of 8192", "decode over 16384", "prompt over 16384"],
)
def test_tokens_and_logprobs_equal_the_reference_beyond_8192(engine, model, length):
    ids = weights.random_ids(length, 1)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=20)
    engine.add(ids.tolist(), params)
    tokens, logprobs = [], []
    while engine.has_work:
        for update in engine.step():
            tokens += update.token_ids
            logprobs += update.logprobs
    with torch.no_grad():
        inputs = torch.tensor([*ids.tolist(), *tokens[:-1]])[None]
        out = model(input_ids=inputs, use_cache=False, logits_to_keep=TOKENS)
        wanted_TV = out.logits[0].numpy()
    assert tokens == wanted_TV.argmax(-1).tolist()
    scale = np.abs(wanted_TV).max()
    wanted_TV = wanted_TV - np.logaddexp.reduce(wanted_TV, axis=-1, keepdims=True)
    for entry, wanted_V in zip(logprobs, wanted_TV, strict=True):
        found = np.array(list(entry.top.values()))
        assert np.abs(found - wanted_V[list(entry.top)]).max() / scale < 1e-4
