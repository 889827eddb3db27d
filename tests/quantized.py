"""Tiny quantized checkpoints of the tests' weights, and the oracle that reads them again.

What writes them is `l4jax.testing`. `decode_tensors` shares no code with it or with the
loader: it takes the bits apart by itself. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l4jax.testing import FORMS, Form, ScaleShape, quantize_tensors
from tests.weights import Tensors, random_tensors, tensor_shapes, write_shards

__all__ = ["FORMS", "Form", "ScaleShape", "decode_tensors", "quantize_tensors", "write_checkpoint"]


def decode_tensors(quantized: Mapping[str, np.ndarray], form: Form) -> Tensors:
    """The float32 weights that a checkpoint means, under the published names, experts unfused.

    Args:
      quantized: what ``quantize_tensors`` returns, or the tensors of such files.
      form: of the files. The dtypes and shapes of scales are taken from the tensors.
    """
    decoded: Tensors = {}
    for name, stored in quantized.items():
        if name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            if form == "w4a16":
                decoded[base] = _decode_int4(stored, quantized[base + "_scale"])
                assert decoded[base].shape == tuple(quantized[base + "_shape"]), name
            else:
                whole = quantized[base + "_global_scale"]
                decoded[base] = _decode_nvfp4(stored, quantized[base + "_scale"], whole)
        elif stored.dtype == np.uint8:
            suffix = _scale_suffix(name)
            factors = quantized[name + suffix], quantized[name + suffix + "_2"]
            decoded |= _decode_modelopt_nvfp4(name, stored, *factors)
        elif stored.dtype == ml_dtypes.float8_e4m3fn and not name.endswith("weight_scale"):
            decoded |= _decode_fp8(name, stored, quantized[name + _scale_suffix(name)])
        elif not re.search(r"[._](weight|input|k|v)_(scale|scale_2|global_scale|shape)$", name):
            decoded[name] = _widen(stored)
    return decoded


def _scale_suffix(name: str) -> str:
    return "_scale" if name.endswith(".weight") else "_weight_scale"


def _widen(stored: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of float32."""
    if stored.dtype != ml_dtypes.bfloat16:
        assert stored.dtype == np.float32, stored.dtype
        return stored
    bits = np.ascontiguousarray(stored).view(np.uint16).astype(np.uint32)
    return (bits << 16).view(np.float32).reshape(stored.shape)


def _float_of_bits(bits: int, mantissa_bits: int, bias: int) -> float:
    """A float without its sign: subnormal where the exponent is 0."""
    exponent, mantissa = bits >> mantissa_bits, bits & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return fraction * 2.0 ** (1 - bias)
    return (1 + fraction) * 2.0 ** (exponent - bias)


def _read_fp8(stored: np.ndarray) -> np.ndarray:
    """1 sign, 4 exponent (bias 7) and 3 mantissa bits; 0x7f alone is NaN, there is no infinity."""
    table = np.empty(256, np.float32)
    for byte in range(256):
        size = _float_of_bits(byte & 0x7F, 3, 7) if byte & 0x7F != 0x7F else np.nan
        table[byte] = -size if byte & 0x80 else size
    return table[np.ascontiguousarray(stored).view(np.uint8)].reshape(stored.shape)


def _decode_modelopt_nvfp4(
    name: str, packed: np.ndarray, scale: np.ndarray, whole: np.ndarray
) -> Tensors:
    """A matrix, or fused experts whose inputs are the middle axis. The global scale multiplies."""
    factor = _read_fp8(scale) * whole.item()
    if packed.ndim == 2:
        return {name: _decode_fp4(packed, factor.astype(np.float32))}
    where, projection = name.rsplit(".", 1)
    halves = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
    width = packed.shape[2] // len(halves)
    decoded: Tensors = {}
    for expert in range(len(packed)):
        both = _decode_fp4(packed[expert].T, factor[expert].T.astype(np.float32))
        for i, half in enumerate(halves):
            decoded[f"{where}.{expert}.{half}.weight"] = both[i * width : (i + 1) * width]
    return decoded


def _decode_fp8(name: str, stored: np.ndarray, scale: np.ndarray) -> Tensors:
    data, factor = _read_fp8(stored), _widen(scale)
    if stored.ndim == 3:
        where, projection = name.rsplit(".", 1)
        return _decode_fused(where, projection, data, factor.item())
    weight = np.empty(data.shape, np.float32)
    for row in range(len(data)):
        weight[row] = data[row] * (factor.reshape(-1)[row] if factor.size > 1 else factor.item())
    return {name: weight}


def _decode_fused(where: str, projection: str, data: np.ndarray, factor: float) -> Tensors:
    """``[E, in, out]``, the gate first in ``out``, times one scale."""
    halves = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
    width = data.shape[2] // len(halves)
    decoded: Tensors = {}
    for expert in range(data.shape[0]):
        for i, half in enumerate(halves):
            weight = np.empty((width, data.shape[1]), np.float32)
            for row in range(width):
                weight[row] = data[expert, :, i * width + row] * np.float32(factor)
            decoded[f"{where}.{expert}.{half}.weight"] = weight
    return decoded


def _decode_int4(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    factor = _widen(scale)
    weight = np.empty((len(packed), packed.shape[1] * 8), np.float32)
    group_size = weight.shape[1] // factor.shape[1]
    for column in range(weight.shape[1]):
        nibble = packed[:, column // 8].astype(np.int64) >> 4 * (column % 8) & 15
        weight[:, column] = (nibble - 8).astype(np.float32) * factor[:, column // group_size]
    return weight


def _decode_nvfp4(packed: np.ndarray, scale: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return _decode_fp4(packed, _read_fp8(scale) / whole.astype(np.float32).item())


def _decode_fp4(packed: np.ndarray, factor: np.ndarray) -> np.ndarray:
    weight = np.empty((len(packed), packed.shape[1] * 2), np.float32)
    for column in range(weight.shape[1]):
        nibbles = packed[:, column // 2] >> 4 * (column % 2) & 15
        for row, nibble in enumerate(nibbles.tolist()):
            size = np.float32(_float_of_bits(nibble & 7, 1, 1))
            weight[row, column] = (-size if nibble & 8 else size) * factor[row, column // 16]
    return weight


def write_checkpoint(
    folder: Path | str,
    config: Mapping[str, Any],
    seed: int,
    form: Form,
    *,
    shards: int = 1,
    group_size: int = 32,
    prefixed: bool = True,
    **choices: Any,
) -> Tensors:
    """Writes ``config.json`` and the safetensors of ``random_tensors``, quantized.

    Args:
      folder: made if it is not there.
      config: what ``tiny_config`` or ``text_only`` return; gets its ``quantization_config``.
      seed: of the weights.
      form: of the files.
      shards: 1 gives ``model.safetensors``; more give ``model-00001-of-0000N.safetensors`` and the
        index. A weight and its scale may then lie in different files.
      group_size: of ``w4a16``.
      prefixed: whether the text model's names keep their ``language_model.``. vLLM takes
        ModelOpt's files with it and without it, beside a vision tower.
      **choices: those of ``quantize_tensors``.

    Returns:
      The tensors that were written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(tensor_shapes(config), seed)
    if not prefixed:
        tensors = {name.removeprefix("language_model."): x for name, x in tensors.items()}
    quantized, description = quantize_tensors(tensors, form, group_size=group_size, **choices)
    described = {**config, "quantization_config": description}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    write_shards(folder, quantized, shards)
    return quantized
