"""Laws of quantizing while loading: the numbers of numpy's own rounding, on one device and many."""

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

MESH = {"hidden": "model", "kv_heads": "model", "vocab": "model", "vision_hidden": "model"}
EXPERT = {**MESH, "experts": "data"}
# Of 512 columns each of four devices has 128, one group: as many groups as on one device.
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


def _round_fp8(values: np.ndarray, inner: int) -> tuple[np.ndarray, np.ndarray]:
    rows = values.reshape(*values.shape[: values.ndim - inner], -1)
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


def _check(loaded: dict[str, Any], expected: dict[str, np.ndarray], form: str, pattern: Any) -> int:
    count = 0
    assert set(loaded) == set(expected)
    for path, array in loaded.items():
        wanted = expected[path]
        assert isinstance(array, Quantized) == bool(pattern.fullmatch(path)), path
        if not isinstance(array, Quantized):
            np.testing.assert_array_equal(np.asarray(array, np.float32), wanted, err_msg=path)
            continue
        count += 1
        if form == "fp8":
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
def test_quantized_while_loaded_is_loaded_and_then_quantized(
    choice: tuple[Any, ...], pattern: str, place: Any, published: Path
) -> None:
    loaded = _load(published, place, *choice)
    assert _check(loaded, _expect(published), choice[0], re.compile(pattern)) >= 6


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_what_is_quantized_is_placed_as_its_axes_are_named(form: str, published: Path) -> None:
    place = place_on_mesh(**EXPERT)
    wide, narrow = _load(published, place), _load(published, place, form, True)
    for path, array in narrow.items():
        if isinstance(array, Quantized):
            assert array.data.sharding == wide[path].sharding, path
            parts = tuple(wide[path].sharding.spec)[: array.scale.ndim]
            assert tuple(array.scale.sharding.spec) == parts, path


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_no_weight_is_off_by_more_than_half_a_step(form: str, published: Path) -> None:
    expected = _expect(published)
    for path, array in _load(published, place_on_one, form, True).items():
        if isinstance(array, Quantized):
            wanted, scale = expected[path], np.asarray(array.scale)
            error = np.abs(np.asarray(dequantize(array, np.float32)) - wanted)
            if form == "int4":
                groups = error.reshape(*scale.shape, -1)
                assert (groups <= 0.5001 * scale[..., None]).all(), path
            else:
                # Three bits of mantissa: half of 2^-3; below 2^-6 steps are even, of 2^-9.
                scale = scale.reshape(*scale.shape, *[1] * (wanted.ndim - scale.ndim))
                bound = np.maximum(np.abs(wanted) / 16, scale * 2.0**-10)
                assert (error <= 1.0001 * bound).all(), path


@pytest.mark.parametrize("place", [place_on_one, place_on_mesh(**EXPERT)], ids=["1", "mesh"])
@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_one_wide_parameter_is_alive_at_a_time(
    form: str, place: Any, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    is_narrow = re.compile(f"{FEED_FORWARD.pattern}|{ATTENTION.pattern}").fullmatch
    shapes = {x.shape for path, x in _expect(published).items() if is_narrow(path)}
    shapes |= {(x[0], x[-1], *x[1:-1]) for x in shapes}  # as the files have fused experts
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
    _load(published, place, form, True, dtype="float32")
    assert len(calls) >= 10


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_converted_checkpoint_is_quantized_alike(
    form: str, published: Path, tmp_path: Path
) -> None:
    assert convert.main([str(published), str(tmp_path / "orbax"), "--quiet"]) == 0
    place = place_on_mesh(**EXPERT)
    wanted, found = _load(published, place, form), _load(tmp_path / "orbax", place, form)
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


def test_channels_of_zeros_stay_zeros() -> None:
    for form in ("fp8", "int4"):
        array = OnlineQuantization(form, True).quantize(
            jax.numpy.zeros((4, 8), "bfloat16"), 1, ("width", "hidden"), place_on_one
        )
        assert (np.asarray(dequantize(array, np.float32)) == 0).all()
        assert (np.asarray(array.scale) == 1).all()


def test_groups_divide_what_a_device_has() -> None:
    assert [choose_group_size(n) for n in (5120, 1024, 128, 96, 200, 131)] == [
        128,
        128,
        128,
        96,
        100,
        1,
    ]


@pytest.mark.parametrize(("form", "stored"), [("fp8", "fp8-dynamic"), ("int4", "w4a16")])
def test_a_quantized_checkpoint_is_loaded_as_it_is_or_refused(
    form: str, stored: quantized.Form, tmp_path: Path
) -> None:
    quantized.write_checkpoint(tmp_path, weights.tiny_config("scout"), 3, stored)
    found, wanted = _load(tmp_path, place_on_one, form), _load(tmp_path, place_on_one)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
    other = {"fp8": "int4", "int4": "fp8"}[form]
    with pytest.raises(CheckpointError, match=rf"already .*{form}.* made {other}: leave .* BF16"):
        _load(tmp_path, place_on_one, other)


def test_formats_that_there_are_not_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"quantization is 'int3': .* fp8 or int4"):
        OnlineQuantization.choose("int3")
    with pytest.raises(CheckpointError, match="nothing is quantized: choose"):
        OnlineQuantization.choose(None, True)
    assert OnlineQuantization.choose(None) is None
    assert dataclasses.astuple(OnlineQuantization("fp8", True)) == ("fp8", True)
