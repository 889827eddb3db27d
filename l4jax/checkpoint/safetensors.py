"""The safetensors format: an index of the tensors in a folder, and views without copies.

A file has the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
offsets into the data), and the data. A shard is mapped into memory once; tensors are views of it.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l4jax.checkpoint.errors import CheckpointError, list_few
from l4jax.json_file import quote, read_object

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's limit, which rejects other files
INDEX = "model.safetensors.index.json"

TensorSpec = tuple[str, tuple[int, ...]]  # dtype by the format's name, shape


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The location of a tensor: `nbytes` from byte `begin` of the file `path`."""

    path: Path
    begin: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Index:
    """The tensors of a folder: headers are read at once, values when a view is touched."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]):
        self.folder, self.tensors = folder, dict(tensors)
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Read the headers of a folder's shards, by its index, or of its only file.

        Raises:
            CheckpointError: there is no checkpoint, a shard is missing or damaged, or the index
                names tensors that its shards do not hold.
        """
        folder = Path(folder)
        index = folder / INDEX
        # A single file wins over an index, which an earlier checkpoint may have left. transformers
        # chooses so, too.
        if (folder / "model.safetensors").exists() or not index.exists():
            return cls(folder, read_header(_find_single_file(folder)))
        shard_of = _read_weight_map(index)
        shards = sorted(set(shard_of.values()))
        absent = [shard for shard in shards if not (folder / shard).exists()]
        if absent:
            raise CheckpointError(
                f"{index} names shards that are not in the folder: {list_few(absent)}; "
                "download them, too."
            )
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            for name, tensor in read_header(folder / shard).items():
                # Tensors that the index lacks are kept, so that matching names finds them.
                if shard_of.setdefault(name, shard) == shard:
                    tensors[name] = tensor
        lost = [name for name in shard_of if name not in tensors]
        if lost:
            raise CheckpointError(
                f"{index} says that {shard_of[lost[0]]} holds {list_few(lost)}, and it does not: "
                "the index and the shards belong to different downloads; download the folder again."
            )
        return cls(folder, tensors)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> (dtype, shape) of every tensor."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    def view(self, name: str) -> np.ndarray:
        """View a tensor as a read-only array in the mapped file: pages are read when touched."""
        tensor = self.tensors[name]
        if not tensor.nbytes:
            return np.empty(tensor.shape, DTYPES[tensor.dtype])
        return np.ndarray(tensor.shape, DTYPES[tensor.dtype], self._map(tensor.path), tensor.begin)

    def release(self, names: Iterable[str]) -> None:
        """Release the mapped pages of tensors; the system's page cache may keep them."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for tensor in (self.tensors[name] for name in names):
            start = tensor.begin - tensor.begin % mmap.PAGESIZE
            if tensor.nbytes:
                length = tensor.begin + tensor.nbytes - start
                self._map(tensor.path).madvise(mmap.MADV_DONTNEED, start, length)

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            if path not in self._maps:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps[path]


def choose_dtype(index: Index) -> str:
    """Choose the dtype to compute in: "float32" if most bytes are stored so, else "bfloat16".

    float16 is never chosen: its range is too small for Llama 4's activations.
    """
    total = dict.fromkeys(("BF16", "F16", "F32"), 0)
    for tensor in index.tensors.values():
        if tensor.dtype in total:
            total[tensor.dtype] += tensor.nbytes
    return "float32" if total["F32"] > total["BF16"] + total["F16"] else "bfloat16"


def read_header(path: Path) -> dict[str, Tensor]:
    """Read the locations of a file's tensors.

    Raises:
        CheckpointError: the file is incomplete, damaged, or of another format.
    """
    if not path.is_file():  # opening a FIFO would wait for a writer
        raise CheckpointError(f"{path} is not a regular file: download it again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull`.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} is cut off or not safetensors: "
                f"its {size} bytes cannot hold the header that it announces; download it again."
            )
        content = file.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_refuse_duplicate_keys)
        header.pop("__metadata__", None)
        entries = {name: _read_entry(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a header that is not safetensors' ({quote(str(error))}): "
            "download it again."
        ) from None
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} has the dtype {dtype[:20]}, and l4jax reads {', '.join(DTYPES)}."
            )
        nbytes = count_bytes((dtype, shape))
        if end - begin != nbytes:
            raise CheckpointError(
                f"{path}: {name} is {dtype} {list(shape)}, which takes {nbytes} bytes, "
                f"and has {end - begin}: the file is damaged; download it again."
            )
        if begin < 0 or 8 + length + end > size:
            raise CheckpointError(
                f"{path} is cut off: {name} ends at byte {8 + length + end} of {size}; "
                "download it again."
            )
        tensors[name] = Tensor(path, 8 + length + begin, nbytes, dtype, shape)
    _check_coverage(path, tensors, 8 + length, size)
    return tensors


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as one file, in the given order; the same tensors give the same bytes.

    The file appears complete or not at all: it is written under another name and renamed.

    Raises:
        CheckpointError: the format lacks a tensor's dtype.
    """
    specs: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"{path}: safetensors cannot hold {name}, which is {tensor.dtype}."
            )
        specs[name] = _DTYPE_NAMES[tensor.dtype], tensor.shape
    stream_safetensors(path, specs, tensors.values())


def stream_safetensors(
    path: str | Path, specs: Mapping[str, TensorSpec], tensors: Iterable[np.ndarray]
) -> None:
    """Write tensors from an iterator as one file, so that memory holds one of them.

    Args:
        path: of the file, which appears complete or not at all.
        specs: name -> (dtype, shape) of each tensor, in order.
        tensors: in the same order, of these dtypes and shapes.
    """
    path = Path(path)
    header, begin = {}, 0
    for name, spec in specs.items():
        end = begin + count_bytes(spec)
        header[name] = {"dtype": spec[0], "shape": spec[1], "data_offsets": (begin, end)}
        begin = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(struct.pack("<Q", len(content)) + content)
            for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
                assert (tensor.dtype, tensor.shape) == (DTYPES[dtype], shape), name
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        unfinished.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def count_bytes(spec: TensorSpec) -> int:
    """Count the bytes of a tensor's values."""
    return math.prod(spec[1]) * DTYPES[spec[0]].itemsize


def _read_entry(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise ValueError(f"{quote(entry)} has a shape or offsets other than whole numbers")
    return str(entry["dtype"]), shape, begin, end


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{duplicate} appears twice")
    return names


def _check_coverage(path: Path, tensors: Mapping[str, Tensor], begin: int, size: int) -> None:
    """Refuse tensors that share bytes, and bytes without a tensor, as the format demands.

    A header with a wrong length may still be JSON, and would shift the data of all tensors.
    """
    last, reached = "the header", begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != reached and tensor.nbytes:
            problem = "overlap" if tensor.begin < reached else "have unused bytes between them"
            raise CheckpointError(
                f"{path}: {last} and {name} {problem}: the file is damaged; download it again."
            )
        last, reached = name, max(reached, tensor.begin + tensor.nbytes)
    if reached != size:
        raise CheckpointError(
            f"{path} has {size} bytes, and its last tensor ends at {reached}: "
            "the file is damaged; download it again."
        )


def _read_weight_map(index: Path) -> dict[str, str]:
    """Read the shard of each tensor."""
    shard_of = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(shard_of, dict) or not all(type(name) is str for name in shard_of.values()):
        raise CheckpointError(
            f"{index} is not the index of a sharded checkpoint, JSON with a weight_map from "
            "tensors to files: download it again."
        )
    outside = [
        name
        for name in shard_of.values()
        if Path(name).name != name or name in ("", "..") or "\\" in name
    ]
    if outside:
        raise CheckpointError(
            f"{index} names {quote(outside[0])}, a file outside its folder: download it again."
        )
    return shard_of


def _find_single_file(folder: Path) -> Path:
    single = folder / "model.safetensors"
    if single.exists():
        return single
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = list_few([path.name for path in found])
        raise CheckpointError(
            f"{folder} holds {names} and no {INDEX} that lists the model's: download it, too."
        )
    for pattern in ("*.pth", "*.pt", "*.bin"):
        if pickles := sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} holds {pickles[0].name}: pickled weights, such as Meta's native format, "
                "are not supported; take the Hugging Face repository of the model, such as "
                "meta-llama/Llama-4-Scout-17B-16E-Instruct."
            )
    raise CheckpointError(
        f"{folder} holds no checkpoint: "
        f"it needs {INDEX}, model.safetensors, one *.safetensors, or orbax/."
    )
