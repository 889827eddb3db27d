"""From a published checkpoint to one in compressed-tensors' layout, for other servers, too.

Routed and shared experts and dense layers are e4m3, or int4 in groups of 128; all else is as it
was.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from l4jax.checkpoint.conversion import open_plain, write_aside
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.names import list_linears, separate
from l4jax.checkpoint.online_quantization import FORMATS, GROUP, OnlineQuantization
from l4jax.checkpoint.parameters import THREADS, make_bar
from l4jax.checkpoint.quantize import WORD
from l4jax.checkpoint.recipe import Part, Recipe, read_box
from l4jax.checkpoint.safetensors import (
    INDEX,
    Index,
    Kind,
    count_bytes,
    stream_safetensors,
)
from l4jax.kernels.formats import quantize_fp8, quantize_int4

SHARD_BYTES = 5 * 10**9  # of a file, at most: as transformers cuts checkpoints


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Stored tensors that are made together: a copy of one, or data and scales.

    Attributes:
        kinds: name -> (dtype, shape).
        recipe: of the parameter that they are a part of, as the source has it.
        part: the part of it that is quantized; None for a copy.
        is_last: whether no other entry needs the tensors of the recipe afterwards.
        format: "fp8" or "int4", of the part.
    """

    kinds: Mapping[str, Kind]
    recipe: Recipe
    part: Part | None
    is_last: bool
    format: str

    @property
    def nbytes(self) -> int:
        return sum(map(count_bytes, self.kinds.values()))


def quantize_folder(
    source: str | Path,
    folder: str | Path,
    quantization: str = "fp8",
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write a model as a quantized checkpoint under the published names, its other files beside it.

    Experts are written one by one. "fp8": e4m3 `[out, in]` with BF16 scales `[out, 1]`, amax / 448.
    "int4": words of eight values `[out, in / 8]` with BF16 scales `[out, in / 128]`, amax / 7. Host
    memory holds one expert's matrix a few times (0.5 GB), or one tensor that is copied. A run that
    is cut off leaves `folder` as it was.

    Args:
        source: a folder with safetensors under the published names, not quantized.
        folder: to be made; one that is not empty is refused.
        quantization: "fp8" or "int4".
        overwrite: replace `folder`, once all is written.

    Returns:
        The bytes of the tensors.

    Raises:
        CheckpointError: no checkpoint, or quantized; a matrix that groups of int4 do not divide;
            `folder` is taken; the disk is full.
    """
    source, folder = Path(source), Path(folder).absolute()
    if quantization not in FORMATS:
        raise CheckpointError(
            f"quantization is {quantization!r}: weights are made {' or '.join(FORMATS)}."
        )
    online_quantization = OnlineQuantization(quantization, attention=False)
    index, recipes, _ = open_plain(source, folder, overwrite=overwrite)
    entries = [
        entry
        for path, recipe in recipes.items()
        for entry in _plan(index, path, recipe, online_quantization)
    ]
    shards = _cut(entries)
    total = sum(entry.nbytes for entry in entries)
    cpu = jax.local_devices(backend="cpu")[0]
    with (
        make_bar(total, "quantizing", progress) as bar,
        ThreadPoolExecutor(THREADS) as pool,
        jax.default_device(cpu),
        write_aside(source, folder, total) as unfinished,
    ):
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            many = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = many if len(shards) > 1 else "model.safetensors"
            kinds = {name: kind for entry in shard for name, kind in entry.kinds.items()}
            weight_map |= dict.fromkeys(kinds, name)
            stream_safetensors(unfinished / name, kinds, _make_all(index, shard, pool, bar))
        if len(shards) > 1:
            _write_json(
                unfinished / INDEX,
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        quantized = {name for entry in entries if entry.part for name in entry.kinds}
        kinds = {name: kind for entry in entries for name, kind in entry.kinds.items()}
        ignored = [name for name in list_linears(kinds) if f"{name}.weight" not in quantized]
        # What stands here already is not copied from `source`.
        raw = json.loads((source / "config.json").read_text())
        described = raw | {"quantization_config": _describe(ignored, quantization)}
        _write_json(unfinished / "config.json", described)
    return total


def _plan(
    index: Index, path: str, recipe: Recipe, online_quantization: OnlineQuantization
) -> Iterator[_Entry]:
    """What is written of a parameter, in order."""
    form = online_quantization.format
    if online_quantization.count_inner(path) is None:
        for part in recipe.parts:
            kind = index.kinds[part.name]
            alone = Recipe((part,), part.shape)
            yield _Entry({part.name: kind}, alone, None, is_last=True, format=form)
        return
    parts = separate(path, recipe.parameter_shape, index.tensors).parts
    for part in parts:
        kinds = _name_fp8(part) if form == "fp8" else _name_int4(part, index.folder)
        yield _Entry(kinds, recipe, part, is_last=part is parts[-1], format=form)


def _name_fp8(part: Part) -> dict[str, Kind]:
    """What a matrix is stored as in fp8, in the order in which `_quantize` makes it."""
    return {
        part.name: ("F8_E4M3", part.stored),
        part.name + "_scale": ("BF16", (part.stored[0], 1)),
    }


def _name_int4(part: Part, where: Path) -> dict[str, Kind]:
    """The same in int4, if it can be."""
    rows, columns = part.stored
    if columns % GROUP:
        raise CheckpointError(
            f"{where}: {part.name} has {columns} columns, which groups of {GROUP} do not divide, "
            "as int4 needs them: quantize it to fp8."
        )
    return {
        part.name + "_packed": ("I32", (rows, columns // WORD)),
        part.name + "_scale": ("BF16", (rows, columns // GROUP)),
        part.name + "_shape": ("I64", (2,)),
    }


def _cut(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """Into files: each as full as `SHARD_BYTES` allows, in order."""
    shards: list[list[_Entry]] = []
    left = 0
    for entry in entries:
        if not shards or entry.nbytes > left:
            shards.append([])
            left = SHARD_BYTES
        shards[-1].append(entry)
        left -= entry.nbytes
    return shards


def _make_all(
    index: Index, entries: Sequence[_Entry], pool: Executor, bar: Any
) -> Iterator[np.ndarray]:
    """The tensors of entries, each made when its turn comes."""
    for entry in entries:
        if entry.part is None:
            yield from map(index.view, entry.kinds)
        else:
            yield from _quantize(index, entry, entry.part, pool)
        if entry.is_last:
            index.release(part.name for part in entry.recipe.parts)
        bar.update(entry.nbytes)


def _quantize(index: Index, entry: _Entry, part: Part, pool: Executor) -> list[np.ndarray]:
    """What is stored of one matrix of a parameter, as `_name_fp8` and `_name_int4` name it."""
    recipe = entry.recipe
    box = tuple(slice(at, at + size) for at, size in zip(part.start, part.shape, strict=True))
    dtypes = {index.tensors[other.name].dtype for other in recipe.parts}
    dtype = ml_dtypes.bfloat16 if dtypes == {"BF16"} else np.float32
    values = read_box(recipe, index.view, recipe.reorder(box), dtype, pool, index.release)
    data, scale = _quantize_matrix(values, recipe.turn, part.stored, entry.format)
    made = [np.asarray(data), np.asarray(scale)]
    return made if entry.format == "fp8" else [*made, np.array(part.stored, np.int64)]


@functools.partial(jax.jit, static_argnames=("order", "shape", "form"))
def _quantize_matrix(values: Any, order: tuple[int, ...], shape: tuple[int, ...], form: str) -> Any:
    """Scales are rounded to BF16 first, so that the data fit what is stored of them."""
    matrix = jnp.transpose(values, order).reshape(shape)
    if form == "int4":
        quantized = quantize_int4(matrix, GROUP, jnp.bfloat16)
        return _pack(quantized.data), quantized.scale.astype(jnp.bfloat16)
    quantized = quantize_fp8(matrix, 1, jnp.bfloat16)
    return quantized.data, quantized.scale[:, None].astype(jnp.bfloat16)


def _pack(values: jax.Array) -> jax.Array:
    """int4 values to int32 words, eight of the last axis in each: plus 8, the first one lowest."""
    nibbles = (values.astype(jnp.int32) + 8).reshape(*values.shape[:-1], -1, WORD)
    shifted = nibbles.astype(jnp.uint32) << (4 * jnp.arange(WORD, dtype=jnp.uint32))
    return jax.lax.bitcast_convert_type(shifted.sum(-1, dtype=jnp.uint32), jnp.int32)


def _describe(ignored: list[str], form: str) -> dict[str, Any]:
    """`quantization_config`, key for key as llm-compressor writes FP8 with dynamic activations, or
    W4A16."""
    common = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "observer_kwargs": {},
        "symmetric": True,
        "type": "float",
    }
    weights = common | {"dynamic": False, "observer": "minmax", "strategy": "channel"}
    inputs = common | {"dynamic": True, "observer": None, "strategy": "token"}
    if form == "int4":
        weights |= {"group_size": GROUP, "num_bits": 4, "strategy": "group", "type": "int"}
    group = {
        "input_activations": inputs if form == "fp8" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized" if form == "fp8" else "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
