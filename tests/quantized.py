"""Tiny quantized checkpoints of the tests' weights, and an independent decoder.

`l4jax.testing` writes them. `decode_tensors` shares no code with it or with the loader. No torch is
needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l4jax.testing import SCHEMES, ScaleShape, Scheme, quantize_tensors
from tests.weights import Tensors, random_tensors, tensor_shapes, write_shards

__all__ = [
    "SCHEMES",
    "ScaleShape",
    "Scheme",
    "decode_tensors",
    "quantize_tensors",
    "write_checkpoint",
]


def decode_tensors(quantized: Mapping[str, np.ndarray], scheme: Scheme) -> Tensors:
    """Decode a checkpoint to float32 weights under the published names, with unfused experts.

    Args:
      quantized: the tensors that ``quantize_tensors`` returns, or those of a checkpoint.
      scheme: of the checkpoint. The dtypes and shapes of scales are read off the tensors.
    """
    decoded: Tensors = {}
    for name, stored in quantized.items():
        if name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            if scheme == "w4a16":
                decoded[base] = _decode_int4(stored, quantized[base + "_scale"])
                assert decoded[base].shape == tuple(quantized[base + "_shape"]), name
            else:
                global_scale = quantized[base + "_global_scale"]
                decoded[base] = _decode_nvfp4(stored, quantized[base + "_scale"], global_scale)
        elif stored.dtype == np.uint8:
            suffix = _scale_suffix(name)
            factors = quantized[name + suffix], quantized[name + suffix + "_2"]
            decoded |= _decode_modelopt_nvfp4(name, stored, *factors)
        elif stored.dtype == ml_dtypes.float8_e4m3fn and not name.endswith("weight_scale"):
            decoded |= _decode_fp8(name, stored, quantized[name + _scale_suffix(name)])
        elif not re.search(r"[._](weight|input|k|v)_(scale|scale_2|global_scale|shape)$", name):
            decoded[name] = _upcast(stored)
    return decoded


def _scale_suffix(name: str) -> str:
    return "_scale" if name.endswith(".weight") else "_weight_scale"


def _upcast(stored: np.ndarray) -> np.ndarray:
    """Upcast to float32: bfloat16 is its upper half."""
    if stored.dtype != ml_dtypes.bfloat16:
        assert stored.dtype == np.float32, stored.dtype
        return stored
    bits = np.ascontiguousarray(stored).view(np.uint16).astype(np.uint32)
    return (bits << 16).view(np.float32).reshape(stored.shape)


def _float_of_bits(bits: int, mantissa_bits: int, bias: int) -> float:
    """Decode the magnitude of a float: subnormal if the exponent is 0."""
    exponent, mantissa = bits >> mantissa_bits, bits & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return fraction * 2.0 ** (1 - bias)
    return (1 + fraction) * 2.0 ** (exponent - bias)


def _read_fp8(stored: np.ndarray) -> np.ndarray:
    """Decode 1 sign, 4 exponent (bias 7) and 3 mantissa bits; 0x7f is NaN, there is no infinity."""
    table = np.empty(256, np.float32)
    for byte in range(256):
        size = _float_of_bits(byte & 0x7F, 3, 7) if byte & 0x7F != 0x7F else np.nan
        table[byte] = -size if byte & 0x80 else size
    return table[np.ascontiguousarray(stored).view(np.uint8)].reshape(stored.shape)


def _decode_modelopt_nvfp4(
    name: str, packed: np.ndarray, scale: np.ndarray, global_scale: np.ndarray
) -> Tensors:
    """Decode a matrix, or fused experts with inputs in the middle; the global scale multiplies."""
    factor = _read_fp8(scale) * global_scale.item()
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
    data, factor = _read_fp8(stored), _upcast(scale)
    if stored.ndim == 3:
        where, projection = name.rsplit(".", 1)
        return _decode_fused(where, projection, data, factor.item())
    weight = np.empty(data.shape, np.float32)
    for row in range(len(data)):
        weight[row] = data[row] * (factor.reshape(-1)[row] if factor.size > 1 else factor.item())
    return {name: weight}


def _decode_fused(where: str, projection: str, data: np.ndarray, factor: float) -> Tensors:
    """Decode ``[E, in, out]``, the gate first in ``out``, with one scale."""
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
    factor = _upcast(scale)
    weight = np.empty((len(packed), packed.shape[1] * 8), np.float32)
    group_size = weight.shape[1] // factor.shape[1]
    for column in range(weight.shape[1]):
        nibble = packed[:, column // 8].astype(np.int64) >> 4 * (column % 8) & 15
        weight[:, column] = (nibble - 8).astype(np.float32) * factor[:, column // group_size]
    return weight


def _decode_nvfp4(packed: np.ndarray, scale: np.ndarray, global_scale: np.ndarray) -> np.ndarray:
    return _decode_fp4(packed, _read_fp8(scale) / global_scale.astype(np.float32).item())


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
    scheme: Scheme,
    *,
    shards: int = 1,
    group_size: int = 32,
    prefixed: bool = True,
    **choices: Any,
) -> Tensors:
    """Write ``config.json`` and the safetensors of ``random_tensors``, quantized.

    Args:
      folder: made if it does not exist.
      config: of ``tiny_config`` or ``text_only``; ``quantization_config`` is added.
      seed: of the weights.
      scheme: of the checkpoint.
      shards: 1 gives ``model.safetensors``; more give ``model-00001-of-0000N.safetensors`` and the
        index. A weight and its scale may be in different files.
      group_size: of ``w4a16``.
      prefixed: whether the decoder's names keep the prefix ``language_model.``. vLLM accepts
        ModelOpt's files with a vision tower with and without it.
      **choices: further arguments of ``quantize_tensors``.

    Returns:
      The written tensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(tensor_shapes(config), seed)
    if not prefixed:
        tensors = {name.removeprefix("language_model."): x for name, x in tensors.items()}
    quantized, description = quantize_tensors(tensors, scheme, group_size=group_size, **choices)
    described = {**config, "quantization_config": description}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    write_shards(folder, quantized, shards)
    return quantized
