"""Quantized checkpoints, byte for byte in the layouts of the published ones.

The value of a stored weight, in float32. With a BF16 scale the product is exact; with an F32 scale
it is rounded once. nvfp4's product or quotient of scales is rounded before:

==================  ============================================================================
`maverick-fp8`      `data * weight_scale`; routed experts only, as in Meta's Maverick-FP8
`fp8-dynamic`       the same; routed and shared experts, and dense layers, as in Red Hat's
`w4a16`             `(nibble - 8) * weight_scale` of its group of inputs; the same layers
`nvfp4`             `e2m1 * (weight_scale / weight_global_scale)`; groups of 16; the same layers
`modelopt-fp8`      `data * weight_scale`, one scale for a tensor; attention too
`modelopt-nvfp4`    `e2m1 * (weight_scale * weight_scale_2)`; the layers of `nvfp4`
==================  ============================================================================

Values are rounded to nearest, ties to even, as torch's casts do; fp8 is clamped at 448 first (a
cast would give nan), int4 at -8 and 7, e2m1 at 6. Scales are amax / 448, amax / 7.5 and amax / 6,
as in compressed-tensors, rounded to their stored dtype before the division: the data account for
that rounding. A row of zeros has the dtype's epsilon as its scale, which keeps it zero.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from l4jax.checkpoint import names

Tensors = dict[str, np.ndarray]
Scheme = Literal["maverick-fp8", "fp8-dynamic", "w4a16", "nvfp4", "modelopt-fp8", "modelopt-nvfp4"]
ScaleShape = Literal["column", "vector", "single", "scalar"]  # [out, 1], [out], [1], []

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

_FP8_MAX, _INT4_STEPS, _FP4_MAX, _FP4_GROUP = 448.0, 7.5, 6.0, 16
_QUANTIZED = {
    "maverick-fp8": names.ROUTED_EXPERTS,
    "fp8-dynamic": names.FEED_FORWARD,
    "w4a16": names.FEED_FORWARD,
    "nvfp4": names.FEED_FORWARD,
    "modelopt-fp8": names.TEXT_LINEAR,
    "modelopt-nvfp4": names.FEED_FORWARD,
}


def quantize_tensors(
    tensors: Mapping[str, np.ndarray],
    scheme: Scheme,
    *,
    group_size: int = 32,
    scale_dtype: Literal["BF16", "F32"] = "BF16",
    scale_shape: ScaleShape = "column",
    fused: bool = True,
    input_scales: bool = True,
) -> tuple[Tensors, dict[str, Any]]:
    """Quantize published tensors; also make the `quantization_config` of the checkpoint.

    Args:
        tensors: under the published names, float32, experts fused `[E, in, out]`. Names are kept,
            of a model with vision or of a text model. Other tensors are returned as bfloat16.
        scheme: of the checkpoint.
        group_size: of `w4a16`: inputs that share a scale. The published checkpoints have 128.
        scale_dtype: of `weight_scale` in the two compressed-tensors fp8 schemes and in `w4a16`.
        scale_shape: of `weight_scale` in the two fp8 schemes: `[out, 1]` as published, `[out]`, or
            one per matrix: `[1]`, as compressed-tensors writes it, or `[]`.
        fused: in the two ModelOpt schemes, whether experts are one tensor `[E, in, out]` (of bytes,
            `[E, in / 2, out]`), with an underscore before `weight_scale`, as ModelOpt writes Llama
            4; or one by one.
        input_scales: in `nvfp4` (`input_global_scale`) and ModelOpt's schemes (`input_scale`, and
            `k_scale`, `v_scale` of quantized attention), whether static scales of activations are
            written. They do not change the weights.

    Raises:
        ValueError: the scheme is unknown; `group_size` (or 16, or 8) does not divide a matrix.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantization is {scheme!r}: checkpoints are {', '.join(SCHEMES)}.")
    if not (scheme.startswith("modelopt") and fused):
        tensors = names.unfuse_experts(tensors)
    quantized: Tensors = {}
    dtype = np.dtype(ml_dtypes.bfloat16 if scale_dtype == "BF16" else np.float32)
    for name, values in tensors.items():
        base = name.removesuffix(".weight")
        if values.ndim < 2 or not _QUANTIZED[scheme].fullmatch(name):
            quantized[name] = values.astype(ml_dtypes.bfloat16)
        elif scheme == "w4a16":
            quantized |= _write_int4(base, values, group_size, dtype)
        elif scheme == "nvfp4":
            quantized |= _write_nvfp4(base, values, input_scales)
        elif scheme.startswith("modelopt"):
            quantized |= _write_modelopt(name, values, scheme, input_scales)
        else:
            scale = _fp8_scale(values, dtype, is_per_tensor=scale_shape in ("single", "scalar"))
            quantized[name] = _round_fp8(values, scale)
            keeps_axis = scale_shape in ("column", "single")
            quantized[base + ".weight_scale"] = scale if keeps_axis else scale[..., 0].copy()
    unquantized = {name: ("BF16", x.shape) for name, x in quantized.items() if name in tensors}
    ignored = [
        name for name in names.list_linears(unquantized) if quantized[f"{name}.weight"].itemsize > 1
    ]
    return quantized, _format_quantization_config(
        scheme, ignored, group_size, scale_shape, input_scales
    )


def _fp8_scale(values: np.ndarray, dtype: np.dtype, *, is_per_tensor: bool) -> np.ndarray:
    """Compute scales `[out, 1]` of `[out, in]`; or a single one `[1]` of any tensor."""
    amax = np.abs(values).max(None if is_per_tensor else -1, keepdims=True)
    scale = _nonzero((amax / np.float32(_FP8_MAX)).astype(dtype))
    return scale.reshape(1) if is_per_tensor else scale


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
    shifts = np.arange(0, 32, 4, dtype=np.uint32)  # the first input in the low nibble
    packed = (_in_groups(base, nibbles, 8) << shifts).sum(-1, dtype=np.uint32)
    return {
        base + ".weight_packed": packed.view(np.int32),
        base + ".weight_scale": scale,
        base + ".weight_shape": np.array(values.shape, np.int64),
    }


def _write_nvfp4(base: str, values: np.ndarray, input_scales: bool) -> Tensors:
    # The largest group's scale becomes 448, fp8's largest value.
    amax = np.abs(values).max()
    global_scale = np.array([_FP8_MAX * _FP4_MAX / amax if amax else 1], np.float32)
    packed, scale = _round_fp4(base, values, global_scale)
    written: Tensors = {
        base + ".weight_packed": packed,
        base + ".weight_scale": scale,
        base + ".weight_global_scale": global_scale,
    }
    if input_scales:
        written[base + ".input_global_scale"] = np.array(
            [_make_up_scale(base, 300, 900)], np.float32
        )
    return written


def _round_fp4(
    base: str, values: np.ndarray, global_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize to bytes `[out, in / 2]` and scales `[out, in / 16]`, which are multiplied by
    `global_scale`."""
    groups = _in_groups(base, values, _FP4_GROUP)
    wanted = global_scale * (np.abs(groups).max(-1) / np.float32(_FP4_MAX))
    scale = _nonzero(np.minimum(wanted, _FP8_MAX).astype(ml_dtypes.float8_e4m3fn))
    scaled = groups / (scale.astype(np.float32) / global_scale)[..., None]
    nibbles = np.clip(scaled, -_FP4_MAX, _FP4_MAX).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    low, high = nibbles.reshape(len(values), -1, 2).transpose(2, 0, 1)
    return low | high << 4, scale


def _write_modelopt(name: str, values: np.ndarray, scheme: Scheme, input_scales: bool) -> Tensors:
    base, joint = name.removesuffix(".weight"), "." if name.endswith(".weight") else "_"
    if scheme == "modelopt-nvfp4":
        written = _write_modelopt_nvfp4(name, f"{base}{joint}weight_scale", values)
    else:
        scale = _fp8_scale(values, np.dtype(np.float32), is_per_tensor=True).reshape(())
        written = {name: _round_fp8(values, scale), f"{base}{joint}weight_scale": scale}
    if input_scales:
        written[f"{base}{joint}input_scale"] = np.array(
            _make_up_scale(base, 0.001, 0.1), np.float32
        )
        if found := names.KEY_OR_VALUE.fullmatch(base):
            cached = np.array(_make_up_scale(base + "cache", 0.01, 0.1), np.float32)
            written[f"{base}.{found[1]}_scale"] = cached
    return written


def _write_modelopt_nvfp4(name: str, scale_name: str, values: np.ndarray) -> Tensors:
    """Quantize `[out, in]`, or fused `[E, in, out]` with the packed axis in the middle."""
    amax = np.abs(values).max()
    global_scale = np.array(amax / (_FP8_MAX * _FP4_MAX) if amax else 1, np.float32)
    matrices = [x.T for x in values] if values.ndim == 3 else [values]
    parts = [_round_fp4(name, x, np.float32(1) / global_scale) for x in matrices]
    packed, scale = (np.stack([part[i].T for part in parts]) for i in range(2))
    if values.ndim == 2:
        packed, scale = (np.ascontiguousarray(x[0].T) for x in (packed, scale))
    return {name: packed, scale_name: scale, scale_name + "_2": global_scale}


def _make_up_scale(name: str, low: float, high: float) -> float:
    """Make up a plausible scale of activations, without calibration."""
    return low + (high - low) * (sum(name.encode()) % 97) / 97


def _format_quantization_config(
    scheme: Scheme, ignored: list[str], group_size: int, scale_shape: ScaleShape, input_scales: bool
) -> dict[str, Any]:
    """Format `quantization_config`, with the keys that each scheme's publisher writes."""
    if scheme.startswith("modelopt"):
        eight_bits = {"dynamic": False, "num_bits": 8, "type": "float"}
        four_bits = eight_bits | {"num_bits": 4, "group_size": _FP4_GROUP}
        bits = eight_bits if scheme == "modelopt-fp8" else four_bits
        group = {"input_activations": bits, "weights": bits, "targets": ["Linear"]}
        config: dict[str, Any] = {
            "config_groups": {"group_0": group},
            "ignore": ignored,
            "quant_algo": "FP8" if scheme == "modelopt-fp8" else "NVFP4",
            "producer": {"name": "modelopt", "version": "0.29.0"},
            "quant_method": "modelopt",
        }
        has_cache_scales = input_scales and scheme == "modelopt-fp8"
        return config | ({"kv_cache_scheme": eight_bits} if has_cache_scales else {})
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
    if scheme == "w4a16":
        changes = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
        weights, inputs, file_format = common | changes, None, "pack-quantized"
    elif scheme == "nvfp4":
        weights = common | {"num_bits": 4, "strategy": "tensor_group", "group_size": _FP4_GROUP}
        inputs, file_format = weights | {"dynamic": "local"}, "nvfp4-pack-quantized"
    else:
        is_per_tensor = scale_shape in ("single", "scalar")
        weights = common | {"strategy": "tensor" if is_per_tensor else "channel"}
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
