"""Hugging Face reads the checkpoints that l4jax writes, completely and bit for bit."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.utils.quantization_config import CompressedTensorsConfig

from l4jax import checkpoint
from l4jax.checkpoint import compressed_tensors_writer
from l4jax.checkpoint.parameters import flatten, unflatten
from l4jax.checkpoint.safetensors import Index
from l4jax.kernels.formats import dequantize
from tests import models, quantized, weights
from tests.checkpoint.published import place_on_one
from tests.reference import oracle
from tests.test_model import assert_close


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_hugging_face_loads_the_written_bits(kind: weights.Kind, tmp_path: Path) -> None:
    raw = weights.tiny_config(kind, num_hidden_layers=2)
    weights.write_checkpoint(tmp_path / "source", raw, 5, dtype="BF16")
    compressed_tensors_writer.quantize_folder(
        tmp_path / "source", tmp_path / "written", progress=False
    )
    model, found = oracle.Model.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path / "written", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(found.values()), found
    state = model.state_dict()
    index = Index.open(tmp_path / "written")
    for name in index.tensors:
        tensor = state[next(key for key in state if key.endswith(name))]
        stored = np.ascontiguousarray(index.view(name))
        np.testing.assert_array_equal(
            tensor.view(torch.uint8).numpy(), stored.view(np.uint8), err_msg=name
        )


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("format", ["fp8", "int4"])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_hugging_face_computes_the_same_weights_and_logits(
    kind: weights.Kind, format: str, tmp_path: Path
) -> None:
    """compressed-tensors dequantizes to l4jax's values, rounded to the scales' BF16; transformers
    computes the logits that l4jax computes from the loaded weights."""
    widths: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "intermediate_size_mlp": 256,
    }
    raw = weights.tiny_config(kind, num_hidden_layers=2, **widths)
    weights.write_checkpoint(tmp_path / "source", raw, 5, dtype="BF16")
    compressed_tensors_writer.quantize_folder(
        tmp_path / "source", tmp_path / "written", format, progress=False
    )
    model, info = oracle.Model.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path / "written",
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    index = Index.open(tmp_path / "written")
    stored = {name: np.array(index.view(name)) for name in index.specs}
    decoded = quantized.decode_tensors(stored, "fp8-dynamic" if format == "fp8" else "w4a16")
    found = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert set(found) == set(decoded)
    for name, values in decoded.items():
        rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[name], rounded, err_msg=name)
    config, ids = checkpoint.load_config(tmp_path / "written"), weights.random_ids(20, 3)
    params = checkpoint.load(tmp_path / "written", config, "float32", place_on_one, progress=False)
    dense = {
        path: dequantize(weight, "bfloat16").astype("float32")
        for path, weight in flatten(params).items()
    }
    ours = models.run_in_pieces(models.Tiny(config, unflatten(dense)), ids, [9])
    assert_close(ours, oracle.logits(model.eval(), ids))
