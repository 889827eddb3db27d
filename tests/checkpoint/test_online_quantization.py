"""Laws of online quantization: values equal numpy's rounding, on one device and on meshes."""

import dataclasses
import gc
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from l4jax import checkpoint, convert
from l4jax.checkpoint import CheckpointError, OnlineQuantization, parameters
from l4jax.checkpoint.online_quantization import choose_group_size
from l4jax.checkpoint.parameters import flatten
from l4jax.kernels.formats import Quantized, dequantize
from tests import quantized, weights
from tests.checkpoint.published import arrange, place_on_mesh, place_on_one

MESH = {
    "hidden": "model",
    "expert_hidden": "model",
    "kv_heads": "model",
    "vocab": "model",
    "vision_hidden": "model",
}
EXPERT = {**MESH, "experts": "data"}
# Each of four devices has 128 of 512 columns, one group: as many groups as on one device.
RAW = {
    "scout": weights.tiny_config("scout", num_hidden_layers=2, intermediate_size=512),
    "maverick": weights.tiny_config(
        "maverick", num_hidden_layers=2, intermediate_size=512, intermediate_size_mlp=1024
    ),
}
FEED_FORWARD = re.compile(r"text/.*/(shared/)?(gate_up|down)")
ATTENTION = re.compile(r"text/.*/attention/(qkv|out)")


@pytest.fixture(scope="module", params=["scout", "maverick"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in BF16."""
    folder = tmp_path_factory.mktemp(request.param)
    weights.write_checkpoint(folder, RAW[request.param], 3, dtype="BF16", shards=2)
    return folder


def _load(folder: Path, place: Any, *choice: Any, dtype: str = "bfloat16") -> dict[str, Any]:
    config = checkpoint.load_config(folder)
    online_quantization = OnlineQuantization.choose(*choice)
    tree = checkpoint.load(
        folder, config, dtype, place, online_quantization=online_quantization, progress=False
    )
    return flatten(tree)


def _expect(folder: Path) -> dict[str, np.ndarray]:
    config = checkpoint.load_config(folder)
    kind = "scout" if config.text.moe_interval == 1 else "maverick"
    tensors = weights.random_tensors(weights.tensor_shapes(RAW[kind]), 3)
    return arrange(tensors, config)


def _round_fp8(values: np.ndarray, in_axes: int) -> tuple[np.ndarray, np.ndarray]:
    rows = values.reshape(*values.shape[: values.ndim - in_axes], -1)
    scale = np.abs(rows).max(-1) * np.float32(1 / 448)
    scale[scale == 0] = 1
    data = np.clip(rows * (1 / scale)[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return data.reshape(values.shape), scale


def _round_int4(values: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    groups = values.reshape(*values.shape[:-1], values.shape[-1] // group, group)
    scale = np.abs(groups).max(-1) * np.float32(1 / 7)
    scale[scale == 0] = 1
    data = np.rint(groups * (1 / scale)[..., None]).astype(np.int8)
    return data.reshape(values.shape), scale


def _check(
    loaded: dict[str, Any], expected: dict[str, np.ndarray], format: str, pattern: Any
) -> int:
    count = 0
    assert set(loaded) == set(expected)
    for path, array in loaded.items():
        wanted = expected[path]
        assert isinstance(array, Quantized) == bool(pattern.fullmatch(path)), path
        if not isinstance(array, Quantized):
            np.testing.assert_array_equal(np.asarray(array, np.float32), wanted, err_msg=path)
            continue
        count += 1
        if format == "fp8":
            data, scale = _round_fp8(wanted, 3 if path.endswith("attention/out") else 1)
            found = np.asarray(array.data)
            assert found.dtype == data.dtype
        else:
            data, scale = _round_int4(wanted, min(128, wanted.shape[-1]))
            assert array.data.dtype == ml_dtypes.int4
            found = np.asarray(array.data).astype(np.int8)
        assert array.scale.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(array.scale), scale, err_msg=path)
        np.testing.assert_array_equal(found, data, err_msg=path)
    return count


@pytest.mark.parametrize(
    "place", [place_on_one, place_on_mesh(**MESH), place_on_mesh(**EXPERT)], ids=["1", "tp", "ep"]
)
@pytest.mark.parametrize(
    ("choice", "pattern"),
    [
        (("fp8",), f"{FEED_FORWARD.pattern}|{ATTENTION.pattern}"),
        (("fp8", False), FEED_FORWARD.pattern),
        (("int4",), FEED_FORWARD.pattern),
        (("int4", True), f"{FEED_FORWARD.pattern}|{ATTENTION.pattern}"),
    ],
    ids=str,
)
def test_online_quantization_equals_quantization_after_loading(
    choice: tuple[Any, ...], pattern: str, place: Any, published: Path
) -> None:
    loaded = _load(published, place, *choice)
    assert _check(loaded, _expect(published), choice[0], re.compile(pattern)) >= 6


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_data_and_scales_are_sharded_by_the_names_of_axes(format: str, published: Path) -> None:
    place = place_on_mesh(**EXPERT)
    plain, quantized = _load(published, place), _load(published, place, format, True)
    for path, array in quantized.items():
        if isinstance(array, Quantized):
            assert array.data.sharding == plain[path].sharding, path
            parts = tuple(plain[path].sharding.spec)[: array.scale.ndim]
            assert tuple(array.scale.sharding.spec) == parts, path


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_quantization_error_is_at_most_half_a_step(format: str, published: Path) -> None:
    expected = _expect(published)
    for path, array in _load(published, place_on_one, format, True).items():
        if isinstance(array, Quantized):
            wanted, scale = expected[path], np.asarray(array.scale)
            error = np.abs(np.asarray(dequantize(array, np.float32)) - wanted)
            if format == "int4":
                groups = error.reshape(*scale.shape, -1)
                assert (groups <= 0.5001 * scale[..., None]).all(), path
            else:
                # Half of the mantissa's 2^-3; below 2^-6 (subnormal) steps are 2^-9.
                scale = scale.reshape(*scale.shape, *[1] * (wanted.ndim - scale.ndim))
                bound = np.maximum(np.abs(wanted) / 16, scale * 2.0**-10)
                assert (error <= 1.0001 * bound).all(), path


@pytest.mark.parametrize("place", [place_on_one, place_on_mesh(**EXPERT)], ids=["1", "mesh"])
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_one_unquantized_parameter_is_alive_at_a_time(
    format: str, place: Any, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    is_quantized = re.compile(f"{FEED_FORWARD.pattern}|{ATTENTION.pattern}").fullmatch
    shapes = {x.shape for path, x in _expect(published).items() if is_quantized(path)}
    shapes |= {(x[0], x[-1], *x[1:-1]) for x in shapes}  # fused experts in the files' layout
    quantize, read, calls = OnlineQuantization.quantize, parameters._load_array, []

    def count() -> int:
        live = [x for x in jax.live_arrays() if id(x) not in before and not x.is_deleted()]
        return sum(x.dtype == np.float32 and x.shape in shapes for x in live)

    def quantize_and_count(*arguments: Any, **kwargs: Any) -> Quantized:
        assert count() == 1
        quantized = quantize(*arguments, **kwargs)
        assert count() == 0
        calls.append(quantized)
        return quantized

    def count_and_read(*arguments: Any, **kwargs: Any) -> jax.Array:
        assert count() == 0
        return read(*arguments, **kwargs)

    monkeypatch.setattr(OnlineQuantization, "quantize", quantize_and_count)
    monkeypatch.setattr(parameters, "_load_array", count_and_read)
    _load(published, place, format, True, dtype="float32")
    assert len(calls) >= 10


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_converted_checkpoint_is_quantized_to_the_same_values(
    format: str, published: Path, tmp_path: Path
) -> None:
    assert convert.main([str(published), str(tmp_path / "orbax"), "--quiet"]) == 0
    place = place_on_mesh(**EXPERT)
    wanted, found = _load(published, place, format), _load(tmp_path / "orbax", place, format)
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


def test_channels_of_zeros_stay_zeros() -> None:
    for format in ("fp8", "int4"):
        array = OnlineQuantization(format, True).quantize(
            jax.numpy.zeros((4, 8), "bfloat16"), 1, ("width", "hidden"), place_on_one
        )
        assert (np.asarray(dequantize(array, np.float32)) == 0).all()
        assert (np.asarray(array.scale) == 1).all()


def test_group_size_divides_a_devices_columns() -> None:
    assert [choose_group_size(n) for n in (5120, 1024, 128, 96, 200, 131)] == [
        128,
        128,
        128,
        96,
        100,
        1,
    ]


@pytest.mark.parametrize(("format", "stored"), [("fp8", "fp8-dynamic"), ("int4", "w4a16")])
def test_quantized_checkpoint_is_loaded_unchanged_or_refused(
    format: str, stored: quantized.Scheme, tmp_path: Path
) -> None:
    quantized.write_checkpoint(tmp_path, weights.tiny_config("scout"), 3, stored)
    found, wanted = _load(tmp_path, place_on_one, format), _load(tmp_path, place_on_one)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
    other = {"fp8": "int4", "int4": "fp8"}[format]
    with pytest.raises(CheckpointError, match=rf"already .*{format}.* made {other}: leave .* BF16"):
        _load(tmp_path, place_on_one, other)


def test_unknown_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"quantization is 'int3': .* fp8 or int4"):
        OnlineQuantization.choose("int3")
    with pytest.raises(CheckpointError, match="nothing is quantized: choose"):
        OnlineQuantization.choose(None, True)
    assert OnlineQuantization.choose(None) is None
    assert dataclasses.astuple(OnlineQuantization("fp8", True)) == ("fp8", True)
