"""Laws of loading: values and shardings are right, and each slice is read once."""

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from l4jax import checkpoint
from l4jax.checkpoint import CheckpointError, parameters
from l4jax.checkpoint.parameters import flatten
from l4jax.model import declare_parameters
from tests import weights
from tests.checkpoint.published import arrange, place_on_mesh, place_on_one

TENSOR = {
    "hidden": "model",
    "expert_hidden": "model",
    "kv_heads": "model",
    "vocab": "model",
    "vision_hidden": "model",
}
EXPERT = {**TENSOR, "experts": "data"}


def _load(folder: Path, place: Any, dtype: Any = np.float32) -> dict[str, jax.Array]:
    config = checkpoint.load_config(folder)
    return flatten(checkpoint.load(folder, config, dtype, place, progress=False))


def _expect(raw: dict[str, Any], **kwargs: Any) -> dict[str, np.ndarray]:
    tensors = weights.random_tensors(weights.tensor_shapes(raw), 3)
    return arrange(tensors, checkpoint.parse_config(raw))


def _check(loaded: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert set(loaded) == set(expected)
    for path, array in loaded.items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), expected[path], err_msg=path)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
@pytest.mark.parametrize(
    "layout",
    [
        {"dtype": "F32"},
        {"dtype": "BF16", "shards": 5},
        {"dtype": "F32", "shards": 3, "fused": False},
        {"dtype": "BF16", "fused": False},
    ],
    ids=lambda layout: "-".join(f"{key}={value}" for key, value in layout.items()),
)
def test_loaded_parameters_equal_the_published_tensors(
    kind: weights.Kind, layout: dict[str, Any], tmp_path: Path
) -> None:
    raw = weights.tiny_config(kind)
    weights.write_checkpoint(tmp_path, raw, 3, **layout)
    expected = _expect(raw)
    _check(_load(tmp_path, place_on_one), expected)
    # Values are exact in bfloat16, so both dtypes hold the same numbers.
    loaded = _load(tmp_path, place_on_mesh(**EXPERT), "bfloat16")
    assert {array.dtype.name for array in loaded.values()} == {"bfloat16"}
    _check(loaded, expected)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_text_only_checkpoint_is_loaded_without_a_prefix(
    kind: weights.Kind, tmp_path: Path
) -> None:
    raw = weights.text_only(weights.tiny_config(kind))
    weights.write_checkpoint(tmp_path, raw, 3)
    _check(_load(tmp_path, place_on_one), _expect(raw))


def test_arrays_are_sharded_by_the_names_of_their_axes(tmp_path: Path) -> None:
    raw = weights.tiny_config("scout")
    weights.write_checkpoint(tmp_path, raw, 3)
    place = place_on_mesh(**EXPERT)
    _, names = declare_parameters(checkpoint.parse_config(raw), np.float32)
    for path, array in _load(tmp_path, place).items():
        assert array.sharding == place(flatten(names)[path]), path


def test_float16_files_are_converted(tmp_path: Path) -> None:
    raw = weights.text_only(weights.tiny_config("scout"))
    weights.write_checkpoint(tmp_path, raw, 3)
    expected = _expect(raw)
    index = checkpoint.safetensors.Index.open(tmp_path)
    halves = {name: index.view(name).astype(np.float16) for name in index.tensors}
    checkpoint.safetensors.write_safetensors(tmp_path / "model.safetensors", halves)
    rounded = {path: x.astype(np.float16).astype(np.float32) for path, x in expected.items()}
    _check(_load(tmp_path, place_on_one), rounded)


@pytest.mark.parametrize("rules", [TENSOR, EXPERT], ids=["tensor", "expert"])
def test_each_slice_is_read_once(
    rules: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.write_checkpoint(tmp_path, weights.tiny_config("scout"), 3, dtype="BF16")
    read_box, read = parameters.read_box, []

    def record(recipe: Any, view: Any, box: Any, *rest: Any) -> np.ndarray:
        values = read_box(recipe, view, box, *rest)
        read.append((recipe.sources[0].name, values.shape))
        return values

    monkeypatch.setattr(parameters, "read_box", record)
    loaded = _load(tmp_path, place_on_mesh(**rules))
    wanted = Counter(len({_hash(s.index) for s in x.addressable_shards}) for x in loaded.values())
    assert Counter(Counter(name for name, _ in read).values()) == wanted
    elements = sum(int(np.prod(shape)) for _, shape in read)
    assert elements == sum(array.size for array in loaded.values())


def _hash(index: tuple[slice, ...]) -> tuple[tuple[Any, Any], ...]:
    return tuple((cut.start, cut.stop) for cut in index)


@pytest.mark.slow
def test_host_memory_holds_few_tensors(tmp_path: Path) -> None:
    raw = weights.text_only(
        weights.tiny_config("scout", intermediate_size=4096, num_hidden_layers=6, hidden_size=128)
    )
    weights.write_checkpoint(tmp_path, raw, 3, dtype="BF16", shards=3)
    place = place_on_mesh(**TENSOR)
    _load(tmp_path, place)  # excludes imports and compilation
    tracemalloc.start()
    loaded = _load(tmp_path, place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [array.nbytes for array in loaded.values()]
    assert sum(sizes) > 9 * max(sizes)
    # Two slices; CPU arrays may adopt numpy's aligned buffers, and jax frees others a call later.
    assert peak < 3 * max(sizes)


def test_read_error_is_raised_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.write_checkpoint(tmp_path, weights.tiny_config("scout"), 3)

    def fail(*_: Any) -> np.ndarray:
        raise OSError("the disk is gone")

    monkeypatch.setattr(parameters, "read_box", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        _load(tmp_path, place_on_one)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    weights.write_checkpoint(tmp_path, weights.tiny_config("scout"), 3)
    other = checkpoint.parse_config(weights.tiny_config("scout", num_hidden_layers=6))
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.5\..* and 9 more: .*config\.json"):
        checkpoint.load(tmp_path, other, np.float32, place_on_one, progress=False)


def test_progress_is_shown_on_standard_error_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights.write_checkpoint(tmp_path, weights.text_only(weights.tiny_config("scout")), 3)
    config = checkpoint.load_config(tmp_path)
    checkpoint.load(tmp_path, config, np.float32, place_on_one, progress=True)
    out, error = capsys.readouterr()
    assert out == ""
    assert "loading" in error
    assert "48/48 parameters" in error
    assert "100%" in error
    _load(tmp_path, lambda _: SingleDeviceSharding(jax.devices()[1]))
    assert capsys.readouterr() == ("", "")
