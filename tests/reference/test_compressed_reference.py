"""Hugging Face reads the fp8 checkpoints that we write: nothing missing, and the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from l4jax.checkpoint import compressed
from l4jax.checkpoint.safetensors import Index
from tests import weights
from tests.reference import oracle


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_hugging_face_reads_what_is_written(kind: weights.Kind, tmp_path: Path) -> None:
    raw = weights.tiny_config(kind, num_hidden_layers=2)
    weights.write_checkpoint(tmp_path / "wide", raw, 5, dtype="BF16")
    compressed.quantize_folder(tmp_path / "wide", tmp_path / "narrow", progress=False)
    model, found = oracle.Model.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path / "narrow", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(found.values()), found
    state = model.state_dict()
    index = Index.open(tmp_path / "narrow")
    for name in index.tensors:
        tensor = state[next(key for key in state if key.endswith(name))]
        stored = np.ascontiguousarray(index.view(name))
        np.testing.assert_array_equal(
            tensor.view(torch.uint8).numpy(), stored.view(np.uint8), err_msg=name
        )
