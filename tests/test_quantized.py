"""Laws of the quantized test checkpoints: rounding, names, and their decoder."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from l4jax import checkpoint
from l4jax.checkpoint.names import detect_quantization, match_names
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.safetensors import Index
from l4jax.model import declare_parameters
from tests import quantized, weights
from tests.checkpoint.published import read_published

PUBLISHED: dict[str, tuple[quantized.Scheme, weights.Kind]] = {
    "maverick-instruct-fp8": ("maverick-fp8", "maverick"),
    "scout-instruct-fp8-dynamic": ("fp8-dynamic", "scout"),
    "scout-instruct-w4a16": ("w4a16", "scout"),
}
# Sizes that differ from each other, from their eighths and from their 32nds: (tiny, published).
DISTINCT: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "intermediate_size_mlp": 96,
    "head_dim": 16,
    "vocab_size": 352,
    "num_local_experts": 7,
    "num_hidden_layers": 2,
}
SIZES = {192: 5120, 320: 8192, 96: 16384, 256: 5120, 128: 1024, 352: 202048}
SIZES |= {192 // 8: 5120 // 8, 320 // 8: 8192 // 8, 192 // 32: 5120 // 128, 320 // 32: 8192 // 128}
CHOICES = [
    {},
    {"scale_dtype": "F32"},
    {"scale_shape": "vector"},
    {"scale_shape": "single", "scale_dtype": "F32"},
    {"scale_shape": "scalar", "scale_dtype": "F32"},
]


@functools.cache
def _make(kind: weights.Kind) -> weights.Tensors:
    return weights.random_tensors(weights.tensor_shapes(weights.tiny_config(kind)), 5)


def _assert_near(
    stored: weights.Tensors, plain: weights.Tensors, scheme: quantized.Scheme, group_size: int = 32
) -> None:
    """Check that dequantized weights equal their source within rounding, and others exactly."""
    decoded, wanted = quantized.decode_tensors(stored, scheme), weights.unfuse_experts(plain)
    assert set(decoded) == set(wanted)
    changed = 0
    for name, values in wanted.items():
        assert decoded[name].dtype == np.float32
        if stored.get(name, np.empty(0)).dtype == ml_dtypes.bfloat16:
            np.testing.assert_array_equal(decoded[name], values, err_msg=name)
            continue
        bound = _bound(values, _find_amax(name, plain, scheme, group_size), scheme)
        off = np.abs(decoded[name] - values)
        assert (off <= bound).all(), name
        assert off.max() > bound.min() / 8, name
        changed += 1
    assert changed > 0


def _find_amax(
    name: str, plain: weights.Tensors, scheme: quantized.Scheme, group_size: int
) -> np.ndarray:
    """Compute ``[out, in]``: a bound of the largest absolute value that shares each scale."""
    values = weights.unfuse_experts(plain)[name]
    if scheme in ("w4a16", "nvfp4", "modelopt-nvfp4"):
        size = group_size if scheme == "w4a16" else 16
        groups = np.abs(values).reshape(len(values), -1, size).max(-1)
        return np.repeat(groups, size, 1)
    fused = re.sub(r"\.\d+\.(gate|up)_proj\.weight$", ".gate_up_proj", name)
    fused = re.sub(r"(experts)\.\d+\.down_proj\.weight$", r"\1.down_proj", fused)
    return np.broadcast_to(np.abs(plain[fused]).max(), values.shape)


def _bound(values: np.ndarray, amax: np.ndarray, scheme: quantized.Scheme) -> np.ndarray:
    if scheme == "w4a16":  # half a step; the largest positive value, 7.5 steps, becomes 7
        return 0.54 * amax / 7.5
    if scheme.endswith("nvfp4"):
        # Half of steps of 0.5, 1 and 2; the scale itself is off by up to 1/16.
        unit = amax / 6
        ratio = np.abs(values) / unit
        return 1.07 * unit * np.where(ratio > 3.7, 1, np.where(ratio > 1.8, 0.5, 0.25))
    # Three mantissa bits, down to 2**-6 of a scale; below that, steps of 2**-9.
    return 1.01 * np.maximum(np.abs(values) / 16, amax / 448 / 1024)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_decoded_weights_equal_the_source_within_rounding(
    scheme: quantized.Scheme, kind: weights.Kind
) -> None:
    stored, _ = quantized.quantize_tensors(_make(kind), scheme)
    _assert_near(stored, _make(kind), scheme)


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("scheme", ["maverick-fp8", "fp8-dynamic"])
def test_scales_of_every_dtype_and_shape_are_decoded(
    scheme: quantized.Scheme, choices: dict[str, Any]
) -> None:
    stored, _ = quantized.quantize_tensors(_make("maverick"), scheme, **choices)
    name = "language_model.model.layers.1.feed_forward.experts.3.up_proj.weight"
    scale = stored[name + "_scale"]
    shapes = {"column": (32, 1), "vector": (32,), "single": (1,), "scalar": ()}
    assert scale.shape == shapes[choices.get("scale_shape", "column")]
    assert scale.dtype == (np.float32 if "scale_dtype" in choices else ml_dtypes.bfloat16)
    _assert_near(stored, _make("maverick"), scheme)


@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_groups_of_every_size_are_decoded(group_size: int) -> None:
    stored, described = quantized.quantize_tensors(_make("scout"), "w4a16", group_size=group_size)
    _assert_near(stored, _make("scout"), "w4a16", group_size)
    assert described["config_groups"]["group_0"]["weights"]["group_size"] == group_size


@pytest.mark.parametrize("scheme", ["modelopt-fp8", "modelopt-nvfp4"])
def test_fused_and_unfused_modelopt_experts_are_decoded(scheme: quantized.Scheme) -> None:
    for fused in (True, False):
        stored, _ = quantized.quantize_tensors(_make("scout"), scheme, fused=fused)
        assert any(name.endswith("experts.down_proj") for name in stored) == fused
        _assert_near(stored, _make("scout"), scheme)


def test_input_scales_change_no_weight() -> None:
    for scheme in ("nvfp4", "modelopt-fp8", "modelopt-nvfp4"):
        with_them, _ = quantized.quantize_tensors(_make("scout"), scheme)
        without, _ = quantized.quantize_tensors(_make("scout"), scheme, input_scales=False)
        assert set(without) < set(with_them)
        wanted = quantized.decode_tensors(without, scheme)
        for name, values in quantized.decode_tensors(with_them, scheme).items():
            np.testing.assert_array_equal(values, wanted[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_dtypes_and_shapes_equal_the_published_ones(name: str, tmp_path: Path) -> None:
    scheme, kind = PUBLISHED[name]
    config = weights.tiny_config(kind, **DISTINCT)
    quantized.write_checkpoint(tmp_path, config, 0, scheme)
    ours = _as_patterns(Index.open(tmp_path).specs)
    theirs = _as_patterns(read_published()[name])
    assert set(ours) == set(theirs)
    experts = {7: 16 if kind == "scout" else 128}
    for pattern, (dtype, shape) in ours.items():
        assert dtype == theirs[pattern][0], pattern
        if pattern.startswith(("vision_model", "multi_modal")):
            assert len(shape) == len(theirs[pattern][1]), pattern
        else:
            grown = tuple((SIZES | experts).get(size, size) for size in shape)
            assert grown == theirs[pattern][1], pattern


def _as_patterns(specs: Any) -> dict[str, Any]:
    return {re.sub(r"\b\d+\b", "*", name): spec for name, spec in specs.items()}


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize(
    ("scheme", "detected"),
    [
        ("maverick-fp8", "compressed-tensors float-quantized fp8"),
        ("fp8-dynamic", "compressed-tensors float-quantized fp8"),
        ("w4a16", "compressed-tensors pack-quantized int4"),
        ("nvfp4", "compressed-tensors nvfp4-pack-quantized"),
        ("modelopt-fp8", "modelopt fp8"),
        ("modelopt-nvfp4", "modelopt nvfp4"),
    ],
)
def test_each_scheme_is_detected_and_its_tensors_match(
    scheme: quantized.Scheme, detected: str, prefixed: bool, tmp_path: Path
) -> None:
    quantized.write_checkpoint(
        tmp_path, weights.tiny_config("maverick"), 1, scheme, prefixed=prefixed
    )
    specs = Index.open(tmp_path).specs
    assert detect_quantization(specs) == detected
    shapes, _ = declare_parameters(checkpoint.load_config(tmp_path), jnp.bfloat16)
    matched = match_names({path: leaf.shape for path, leaf in flatten(shapes).items()}, specs)
    assert matched.unknown == matched.missing == ()


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_files_hold_the_quantized_tensors(scheme: quantized.Scheme, tmp_path: Path) -> None:
    config = weights.text_only(weights.tiny_config("scout"))
    wanted = quantized.write_checkpoint(tmp_path, config, 2, scheme, shards=3)
    index = Index.open(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert set(index.specs) == set(wanted)
    for name, values in wanted.items():
        found = index.view(name)
        assert (found.dtype, found.shape) == (values.dtype, values.shape)
        assert found.tobytes() == values.tobytes(), name
    read = json.loads((tmp_path / "config.json").read_text())
    method = "modelopt" if scheme.startswith("modelopt") else "compressed-tensors"
    assert read.pop("quantization_config")["quant_method"] == method
    assert read == config


def test_ignored_modules_are_the_unquantized_linears() -> None:
    for scheme in quantized.SCHEMES:
        stored, described = quantized.quantize_tensors(_make("maverick"), scheme)
        plain = {
            name.removesuffix(".weight")
            for name, values in stored.items()
            if values.dtype == ml_dtypes.bfloat16 and values.ndim == 2 and name.endswith(".weight")
        }
        assert set(described["ignore"]) == plain - {"language_model.model.embed_tokens"}


def _quantize_row(row: list[float], scheme: quantized.Scheme, **choices: Any) -> weights.Tensors:
    name = "model.layers.0.feed_forward.up_proj.weight"
    tensors = {name: np.array([row], np.float32)}
    stored, _ = quantized.quantize_tensors(tensors, scheme, **choices)
    return stored


def _decode_row(row: list[float], scheme: quantized.Scheme, **choices: Any) -> list[float]:
    (decoded,) = quantized.decode_tensors(_quantize_row(row, scheme, **choices), scheme).values()
    return decoded[0].tolist()


def test_ties_round_to_even_and_large_values_are_clamped() -> None:
    # fp8: a scale of 1; between 1 and 2 the steps are 1/8, below 2**-6 they are 2**-9
    row = [448, 1.0625, 1.1875, 2**-10, 3 * 2**-10, -1.0625]
    assert _decode_row(row, "fp8-dynamic") == [448, 1, 1.25, 0, 2**-8, -1]
    # bfloat16 rounds 449 / 448 down to 1, so that 449 exceeds the range: it must not become NaN
    assert _decode_row([449, -449], "fp8-dynamic") == [448, -448]
    # int4: a scale of 1; 7.5 would round to 8
    row = [7.5, 0.5, 1.5, -0.5, -7.5, 2.5, 0, -2]
    assert _decode_row(row, "w4a16", group_size=8) == [7, 0, 2, 0, -8, 2, 0, -2]
    # e2m1: the group's scale is 1; halves between its eight sizes
    row = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5, 4, 3, 2, 1, 0]
    wanted = [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -4, 4, 3, 2, 1, 0]
    assert _decode_row(row, "nvfp4") == wanted


def test_zeros_are_decoded_to_zeros() -> None:
    for scheme in set(quantized.SCHEMES) - {"maverick-fp8"}:
        assert _decode_row([0.0] * 32, scheme) == [0.0] * 32


def test_low_nibble_is_the_first_value() -> None:
    stored = _quantize_row([-7.5, -7, -6, -5, -4, -3, -2, -1], "w4a16", group_size=8)
    packed = stored["model.layers.0.feed_forward.up_proj.weight_packed"]
    assert packed.view(np.uint32).tolist() == [[0x76543210]]
    stored = _quantize_row([6, -0.5] + [0] * 14, "nvfp4")
    packed = stored["model.layers.0.feed_forward.up_proj.weight_packed"]
    assert packed[0, 0] == 0x97
    name = "model.layers.0.feed_forward.experts.down_proj"
    values = np.zeros((1, 16, 3), np.float32)
    values[0, :2, 1] = 6, -0.5
    stored, _ = quantized.quantize_tensors({name: values}, "modelopt-nvfp4")
    assert stored[name].shape == (1, 8, 3) and stored[name][0, 0].tolist() == [0, 0x97, 0]


def test_decoder_reads_all_fp8_numbers() -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 128)
    scale = np.ones((2, 1), np.float32)
    found = quantized.decode_tensors({"x.weight": every, "x.weight_scale": scale}, "fp8-dynamic")
    np.testing.assert_array_equal(found["x.weight"], every.astype(np.float32))


def test_widths_not_divided_by_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"up_proj is 40 wide, which groups of 32 do not divide"):
        _quantize_row([1.0] * 40, "w4a16")
    with pytest.raises(ValueError, match=r"40 wide, which groups of 16"):
        _quantize_row([1.0] * 40, "nvfp4")
