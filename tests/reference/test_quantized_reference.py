"""Hugging Face and compressed-tensors decode the quantized test checkpoints like our decoder.

transformers loads Llama 4 with unfused experts on a CPU and dequantizes them in the dtype of the
scales: with F32 scales every weight equals the decoder's, with the published BF16 scales it equals
the decoder's rounded to bfloat16 once. ModelOpt's format has no reference here.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers.utils.quantization_config import CompressedTensorsConfig

from tests import quantized, weights
from tests.reference import oracle

SCHEMES: tuple[quantized.Scheme, ...] = ("maverick-fp8", "fp8-dynamic", "w4a16", "nvfp4")
TORCH = {  # dtypes that torch reads from numpy as bits only
    np.dtype(ml_dtypes.bfloat16): (np.uint16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
}
# transformers warns that config.json has a quantization; the tests add `dequantize` only.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


def _load(folder: Path) -> weights.Tensors:
    model = oracle.Model.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _assert_equal(found: weights.Tensors, wanted: weights.Tensors) -> None:
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
@pytest.mark.parametrize("scheme", ["maverick-fp8", "fp8-dynamic", "w4a16"])
def test_transformers_dequantizes_to_the_decoded_weights(
    scheme: quantized.Scheme, kind: weights.Kind, tmp_path: Path
) -> None:
    config = weights.tiny_config(kind)
    stored = quantized.write_checkpoint(
        tmp_path, config, 4, scheme, shards=3, group_size=16, scale_dtype="F32"
    )
    _assert_equal(_load(tmp_path), quantized.decode_tensors(stored, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_rounds_to_the_published_scales_dtype(
    scheme: quantized.Scheme, tmp_path: Path
) -> None:
    config = weights.tiny_config("scout")
    stored = quantized.write_checkpoint(tmp_path, config, 4, scheme, input_scales=False)
    decoded = quantized.decode_tensors(stored, scheme)
    rounded = {name: _round_to_bf16(values) for name, values in decoded.items()}
    assert any((rounded[name] != decoded[name]).any() for name in decoded)
    _assert_equal(_load(tmp_path), rounded)


NAME = "model.layers.0.feed_forward.experts.0.up_proj.weight"


def _draw_matrix() -> np.ndarray:
    """Draw float32 ``[out, in]`` with a row of zeros, and a row without positive values."""
    values = weights.random_tensors({NAME: (48, 64)}, 6)[NAME]
    values[5] = 0
    values[6] = -np.abs(values[6])
    return values


def _make(scheme: quantized.Scheme, **choices: Any) -> tuple[weights.Tensors, QuantizationScheme]:
    """Quantize the matrix; also parse its scheme with compressed-tensors."""
    stored, described = quantized.quantize_tensors(
        {NAME: _draw_matrix()}, scheme, input_scales=False, **choices
    )
    parsed = QuantizationConfig.model_validate(described).config_groups["group_0"]
    assert isinstance(parsed, QuantizationScheme)
    return stored, parsed


def _as_torch_module(stored: weights.Tensors) -> dict[str, torch.Tensor]:
    """Key tensors by the last part of their names: weight_packed, weight_scale, ..."""
    return {name.rsplit(".", 1)[-1]: _as_torch(array) for name, array in stored.items()}


def _as_torch(array: np.ndarray) -> torch.Tensor:
    bits, dtype = TORCH.get(array.dtype, (array.dtype, None))
    tensor = torch.from_numpy(np.array(array.view(bits)))
    return tensor if dtype is None else tensor.view(dtype)


@pytest.mark.parametrize(
    ("scheme", "choices"),
    [
        ("fp8-dynamic", {"scale_dtype": "F32"}),
        ("fp8-dynamic", {"scale_dtype": "F32", "scale_shape": "single"}),
        ("w4a16", {"scale_dtype": "F32", "group_size": 8}),
        ("w4a16", {"scale_dtype": "F32", "group_size": 32}),
        ("nvfp4", {}),
    ],
)
def test_compressed_tensors_writes_the_same_bytes(
    scheme: quantized.Scheme, choices: dict[str, Any]
) -> None:
    """Scales and data of float32 weights are equal, with F32 scales."""
    arrays, parsed = _make(scheme, **choices)
    stored, weight = _as_torch_module(arrays), torch.from_numpy(_draw_matrix())
    args, global_scale = parsed.weights, None
    assert args is not None
    if scheme == "nvfp4":  # data are computed from the stored scales
        args = args.model_copy(update={"scale_dtype": torch.float8_e4m3fn})
        global_scale = generate_gparam(weight.min(), weight.max())
    is_per_tensor = choices.get("scale_shape") == "single"
    size = args.group_size or (weight.numel() if is_per_tensor else weight.shape[1])
    groups = weight.reshape(-1, size)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=global_scale)
    given: dict[str, torch.Tensor | None] = {
        "weight": weight,
        "weight_scale": scale.reshape(stored["weight_scale"].shape),
    }
    if global_scale is not None:
        given["weight_global_scale"] = global_scale
    file_format = {"fp8-dynamic": "float-quantized", "w4a16": "pack-quantized"}
    compressor = BaseCompressor.get_value_from_registry(
        file_format.get(scheme, "nvfp4-pack-quantized")
    )
    written = compressor.compress(given, parsed)
    assert set(written) == set(stored)
    for name, wanted in stored.items():
        found = written[name]
        assert found is not None and found.dtype == wanted.dtype, name
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name


def test_compressed_tensors_divides_by_the_global_scale_of_nvfp4() -> None:
    """In float32 it rounds like l4jax: first the scale, then the product."""
    arrays, parsed = _make("nvfp4")
    stored = _as_torch_module(arrays)
    rows, width = stored["weight_packed"].shape
    found = dequantize(
        unpack_fp4_from_uint8(stored["weight_packed"], rows, 2 * width, dtype=torch.float32),
        stored["weight_scale"].float(),
        args=parsed.weights,
        dtype=torch.float32,
        global_scale=stored["weight_global_scale"],
    )
    np.testing.assert_array_equal(found.numpy(), quantized.decode_tensors(arrays, "nvfp4")[NAME])
