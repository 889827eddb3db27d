"""Laws of the safetensors format: written files are read, damaged files are refused."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from l4jax.checkpoint import CheckpointError, choose_dtype
from l4jax.checkpoint import safetensors as ours
from l4jax.checkpoint.safetensors import DTYPES, Index, read_header, write_safetensors


def test_written_tensors_of_each_dtype_are_read_back(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    tensors = {name: random.randint(1, 3, (3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"], tensors["empty"] = np.full((), 3, np.float32), np.zeros((0, 4), np.int8)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    index = Index.open(tmp_path)
    assert index.specs["BF16"] == ("BF16", (3, 5))
    for name, tensor in tensors.items():
        view = index.view(name)
        assert view.dtype == tensor.dtype
        assert view.shape == tensor.shape
        assert view.tobytes() == tensor.tobytes()
        assert not view.flags.writeable or not view.size


def test_view_copies_nothing_and_survives_release(tmp_path: Path) -> None:
    tensor = np.arange(10_000, dtype=np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"first": tensor[:3], "second": tensor})
    index = Index.open(tmp_path)
    view = index.view("second")
    assert not view.flags.owndata
    index.release(["first", "second"])
    np.testing.assert_array_equal(view, tensor)


def test_files_are_exchanged_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)}
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    (tmp_path / "ours.safetensors").unlink()
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    index = Index.open(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[name], tensor)
        np.testing.assert_array_equal(index.view(name), tensor)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": np.ones(3, np.float32), "a": np.zeros((2, 2), ml_dtypes.bfloat16)}
    for name in ("one", "two"):
        write_safetensors(tmp_path / name, tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match="complex128"):
        write_safetensors(path, {"a": np.ones(3, np.complex128)})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert read_header(path)["a"].shape == (3,)


def _write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)


def _entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "a header longer than the file": (b"{}", b"", 1000, "cut off or not safetensors"),
    "a header beyond the limit": (b"{}", b"", 2**40, "cut off or not safetensors"),
    "no JSON": (b"{nonsense}", b"", None, "header"),
    "no object": (b"[1, 2]", b"", None, "header"),
    "a name twice": (b'{"a": {}, "a": {}}', b"", None, "a appears twice"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "shape"),
    "a fraction": ({"a": _entry(0, 8, shape=(0.5,))}, bytes(8), None, "whole numbers"),  # type: ignore
    "a negative offset": ({"a": _entry(-8, 0)}, bytes(8), None, "whole numbers"),
    "an unknown dtype": ({"a": _entry(0, 8, "F9")}, bytes(8), None, "a has the dtype F9"),
    "a wrong size": ({"a": _entry(0, 4)}, bytes(8), None, r"a is F32 \[2\], which takes 8"),
    "an end outside": ({"a": _entry(8, 16)}, bytes(8), None, "cut off: a ends at byte"),
    "an overlap": (
        {"a": _entry(0, 8), "b": _entry(4, 12)},
        bytes(12),
        None,
        "a and b overlap",
    ),
    "a Git LFS pointer": (b"", b"", int.from_bytes(b"version ", "little"), "git lfs pull"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    header, data, length, message = DAMAGED[damage]
    path = tmp_path / "model.safetensors"
    _write_raw(path, header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        Index.open(tmp_path)
    assert str(path) in str(caught.value)


def test_truncated_shard_is_refused_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.ones(3, np.float32), "b": np.ones(5, np.int8)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off"):
            Index.open(tmp_path)


def _write_sharded(folder: Path, **weight_map: str) -> None:
    for i, shard in enumerate(sorted(set(weight_map.values()))):
        names = [name for name, where in weight_map.items() if where == shard]
        write_safetensors(folder / shard, {name: np.full(2, i, np.float32) for name in names})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_index_joins_its_shards(tmp_path: Path) -> None:
    _write_sharded(tmp_path, a="1.safetensors", b="2.safetensors", c="1.safetensors")
    index = Index.open(tmp_path)
    assert set(index.tensors) == {"a", "b", "c"}
    assert index.view("b")[0] == 1
    # If two shards hold a tensor, the index decides; tensors outside the index are kept.
    write_safetensors(
        tmp_path / "1.safetensors",
        {name: np.full(2, 7, np.float32) for name in ("a", "b", "c", "stray")},
    )
    index = Index.open(tmp_path)
    assert set(index.tensors) == {"a", "b", "c", "stray"}
    assert index.view("b")[0] == 1


def test_index_that_contradicts_its_shards_is_refused(tmp_path: Path) -> None:
    _write_sharded(tmp_path, a="1.safetensors", b="2.safetensors")
    write_safetensors(tmp_path / "2.safetensors", {"c": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"2\.safetensors holds b, and it does not"):
        Index.open(tmp_path)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not in the folder: 2\.safetensors"):
        Index.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        Index.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no checkpoint: it needs model\.safetensors\.index\.json"),
        (["consolidated.00.pth"], r"pickled.*meta-llama/Llama-4"),
        (["pytorch_model.bin"], r"pytorch_model\.bin: pickled"),
        (["a.safetensors", "b.safetensors"], r"a\.safetensors, b\.safetensors and no model"),
    ],
)
def test_folder_without_a_checkpoint_is_refused_by_its_files(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        Index.open(tmp_path)


def test_chosen_dtype_is_that_of_most_bytes_and_never_float16(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for dtype, found in (("F16", "bfloat16"), ("BF16", "bfloat16"), ("F32", "float32")):
        write_safetensors(path, {"a": np.ones(9, DTYPES[dtype]), "b": np.ones(2, np.float32)})
        assert choose_dtype(tmp_path) == found
    assert ours.choose_dtype(Index.open(tmp_path)) == "float32"
