"""Tiny quantized checkpoints, byte for byte in the layouts of the published ones; without torch.

``quantize_tensors`` writes them, ``decode_tensors`` reads them again. The two share no code: the
decoder takes bits apart by itself, so that it can be the oracle of the loader.

What a stored weight means, in float32. With a BF16 scale the product is exact, with an F32 one it
is rounded once; nvfp4's quotient of scales is rounded before:

========================  ==============================================================
``maverick-fp8``          ``data * weight_scale``; routed experts alone
``fp8-dynamic``           the same; routed and shared experts, and dense layers
``w4a16``                 ``(nibble - 8) * weight_scale`` of its group of inputs
``nvfp4``                 ``e2m1 * (weight_scale / weight_global_scale)``; groups of 16
``modelopt-fp8``          ``data * weight_scale``, one scale for a tensor; attention too
========================  ==============================================================

Rounding: to nearest, ties to even, as the casts of torch do; fp8 is clamped at 448 first (a cast
would give NaN), int4 at -8 and 7, e2m1 at 6. Scales are amax / 448, amax / 7.5 and amax / 6, as
compressed-tensors has them, in their stored dtype before the division: the data make good for the
scale's rounding. A row of zeros has the scale that keeps it zero, the dtype's epsilon.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from tests.weights import (
    Tensors,
    random_tensors,
    tensor_shapes,
    unfuse_experts,
    write_shards,
)

Form = Literal["maverick-fp8", "fp8-dynamic", "w4a16", "nvfp4", "modelopt-fp8"]
ScaleShape = Literal["column", "vector", "single", "scalar"]  # [out, 1], [out], [1], []

FORMS: tuple[Form, ...] = ("maverick-fp8", "fp8-dynamic", "w4a16", "nvfp4", "modelopt-fp8")

_FP8_MAX, _INT4_STEPS, _FP4_MAX, _FP4_GROUP = 448.0, 7.5, 6.0, 16
_ROUTED = re.compile(r".*\.feed_forward\.experts\..*")
_FEED_FORWARD = re.compile(r".*\.feed_forward\.(?!router).*")
_TEXT_LINEAR = re.compile(r"(?!vision_model\.).*\.(self_attn|feed_forward)\.(?!router).*")
_QUANTIZED: Mapping[Form, re.Pattern[str]] = {
    "maverick-fp8": _ROUTED,
    "fp8-dynamic": _FEED_FORWARD,
    "w4a16": _FEED_FORWARD,
    "nvfp4": _FEED_FORWARD,
    "modelopt-fp8": _TEXT_LINEAR,
}


def quantize_tensors(
    tensors: Mapping[str, np.ndarray],
    form: Form,
    *,
    group_size: int = 32,
    scale_dtype: Literal["BF16", "F32"] = "BF16",
    scale_shape: ScaleShape = "column",
    fused: bool = True,
    input_scales: bool = True,
) -> tuple[Tensors, dict[str, Any]]:
    """Published tensors -> those of a quantized checkpoint, and its ``quantization_config``.

    Args:
      tensors: what ``random_tensors`` makes: float32, experts fused ``[E, in, out]``. What is not
        quantized comes back as bfloat16, in which it is exact. Names stay as they are, with
        ``language_model.`` or without.
      form: of the files.
      group_size: of ``w4a16``: how many inputs share a scale. The published files have 128.
      scale_dtype: of ``weight_scale`` in the two compressed-tensors fp8 forms and in ``w4a16``.
      scale_shape: of it in the two fp8 forms: ``[out, 1]`` as published, ``[out]``, or one for
        the whole matrix: ``[1]``, as compressed-tensors writes it, or ``[]``.
      fused: of ``modelopt-fp8``: experts as ``experts.gate_up_proj [E, in, out]`` with
        ``experts.gate_up_proj_weight_scale``, as ModelOpt writes Llama 4; or one by one.
      input_scales: of ``nvfp4`` (``input_global_scale``) and ``modelopt-fp8`` (``input_scale``,
        ``k_scale``, ``v_scale``): whether the static scales of activations are there. They do not
        change the weights.

    Raises:
      ValueError: a matrix is not so many times ``group_size`` (or 16, or 8) wide.
    """
    if not (form == "modelopt-fp8" and fused):
        tensors = unfuse_experts(dict(tensors))
    quantized: Tensors = {}
    ignored: list[str] = []
    dtype = np.dtype(ml_dtypes.bfloat16 if scale_dtype == "BF16" else np.float32)
    for name, values in tensors.items():
        base = name.removesuffix(".weight")
        if values.ndim < 2 or not _QUANTIZED[form].fullmatch(name):
            quantized[name] = values.astype(ml_dtypes.bfloat16)
            if values.ndim == 2 and "embed" not in base.rsplit(".", 1)[-1] and base != name:
                ignored.append(base)
        elif form == "w4a16":
            quantized |= _write_int4(base, values, group_size, dtype)
        elif form == "nvfp4":
            quantized |= _write_nvfp4(base, values, input_scales)
        elif form == "modelopt-fp8":
            quantized |= _write_modelopt(name, values, input_scales)
        else:
            scale = _fp8_scale(values, dtype, is_single=scale_shape in ("single", "scalar"))
            quantized[name] = _round_fp8(values, scale)
            as_it_is = scale_shape in ("column", "single")
            quantized[base + ".weight_scale"] = scale if as_it_is else scale[..., 0].copy()
    return quantized, _describe(form, ignored, group_size, scale_shape, input_scales)


def _fp8_scale(values: np.ndarray, dtype: np.dtype, *, is_single: bool) -> np.ndarray:
    """Of ``[out, in]``: ``[out, 1]``; of any tensor, if there is to be a single one: ``[1]``."""
    amax = np.abs(values).max(None if is_single else -1, keepdims=True)
    scale = _nonzero((amax / np.float32(_FP8_MAX)).astype(dtype))
    return scale.reshape(1) if is_single else scale


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, ml_dtypes.finfo(scale.dtype).eps, scale).astype(scale.dtype)


def _round_fp8(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    scaled = np.clip(values / scale.astype(np.float32), -_FP8_MAX, _FP8_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn)


def _in_groups(base: str, values: np.ndarray, size: int) -> np.ndarray:
    if values.shape[1] % size:
        raise ValueError(
            f"{base} is {values.shape[1]} wide, which groups of {size} do not divide: "
            "take another group_size or a wider config."
        )
    return values.reshape(len(values), -1, size)


def _write_int4(base: str, values: np.ndarray, group_size: int, dtype: np.dtype) -> Tensors:
    groups = _in_groups(base, values, group_size)
    amax = np.abs(groups).max(-1)
    scale = _nonzero((amax / np.float32(_INT4_STEPS)).astype(dtype))
    steps = np.rint(groups / scale.astype(np.float32)[..., None])
    nibbles = (np.clip(steps, -8, 7) + 8).astype(np.uint32).reshape(values.shape)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)  # the first input lies in the low nibble
    packed = (_in_groups(base, nibbles, 8) << shifts).sum(-1, dtype=np.uint32)
    return {
        base + ".weight_packed": packed.view(np.int32),
        base + ".weight_scale": scale,
        base + ".weight_shape": np.array(values.shape, np.int64),
    }


def _write_nvfp4(base: str, values: np.ndarray, input_scales: bool) -> Tensors:
    groups = _in_groups(base, values, _FP4_GROUP)
    # The largest group's scale becomes 448: the whole range of fp8 is used.
    amax = np.abs(values).max()
    whole = np.array([_FP8_MAX * _FP4_MAX / amax if amax else 1], np.float32)
    wanted = whole * (np.abs(groups).max(-1) / np.float32(_FP4_MAX))
    scale = _nonzero(np.minimum(wanted, _FP8_MAX).astype(ml_dtypes.float8_e4m3fn))
    scaled = groups / (scale.astype(np.float32) / whole)[..., None]
    nibbles = np.clip(scaled, -_FP4_MAX, _FP4_MAX).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    low, high = nibbles.reshape(len(values), -1, 2).transpose(2, 0, 1)
    written: Tensors = {
        base + ".weight_packed": low | high << 4,
        base + ".weight_scale": scale,
        base + ".weight_global_scale": whole,
    }
    if input_scales:
        written[base + ".input_global_scale"] = np.array([_made_up(base, 300, 900)], np.float32)
    return written


def _write_modelopt(name: str, values: np.ndarray, input_scales: bool) -> Tensors:
    base, joint = name.removesuffix(".weight"), "." if name.endswith(".weight") else "_"
    scale = _fp8_scale(values, np.dtype(np.float32), is_single=True).reshape(())
    written: Tensors = {name: _round_fp8(values, scale), f"{base}{joint}weight_scale": scale}
    if input_scales:
        written[f"{base}{joint}input_scale"] = np.array(_made_up(base, 0.001, 0.1), np.float32)
        if found := re.search(r"\.([kv])_proj$", base):
            cached = np.array(_made_up(base + "cache", 0.01, 0.1), np.float32)
            written[f"{base}.{found[1]}_scale"] = cached
    return written


def _made_up(name: str, low: float, high: float) -> float:
    """A plausible scale of activations: nobody calibrated anything here."""
    return low + (high - low) * (sum(name.encode()) % 97) / 97


def _describe(
    form: Form, ignored: list[str], group_size: int, scale_shape: ScaleShape, input_scales: bool
) -> dict[str, Any]:
    """``quantization_config``, with the keys that each form's publisher writes."""
    if form == "modelopt-fp8":
        eight_bits = {"dynamic": False, "num_bits": 8, "type": "float"}
        group = {"input_activations": eight_bits, "weights": eight_bits, "targets": ["Linear"]}
        config: dict[str, Any] = {
            "config_groups": {"group_0": group},
            "ignore": ignored,
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": "0.29.0"},
            "quant_method": "modelopt",
        }
        return config | ({"kv_cache_scheme": eight_bits} if input_scales else {})
    common = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "symmetric": True,
        "type": "float",
    }
    if form == "w4a16":
        changes = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
        weights, inputs, file_format = common | changes, None, "pack-quantized"
    elif form == "nvfp4":
        weights = common | {"num_bits": 4, "strategy": "tensor_group", "group_size": _FP4_GROUP}
        inputs, file_format = weights | {"dynamic": "local"}, "nvfp4-pack-quantized"
    else:
        is_single = scale_shape in ("single", "scalar")
        weights = common | {"strategy": "tensor" if is_single else "channel"}
        inputs = common | {"dynamic": True, "observer": None, "strategy": "token"}
        file_format = "float-quantized"
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group | {"weights": weights}},
        "format": file_format,
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


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
        elif stored.dtype == ml_dtypes.float8_e4m3fn and not name.endswith("weight_scale"):
            decoded |= _decode_fp8(name, stored, quantized[name + _scale_suffix(name)])
        elif not re.search(r"[._](weight|input|k|v)_(scale|global_scale|shape)$", name):
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
    factor = _read_fp8(scale) / whole.astype(np.float32).item()
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
