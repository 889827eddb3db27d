"""Conversion of a published checkpoint to compressed-tensors' layout, which other servers read.

Routed and shared experts and dense layers become e4m3 (FP8-dynamic), or int4 in groups of 128
(W4A16). Other tensors are copied.
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

from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.names import list_linears, make_unfused_recipe
from l4jax.checkpoint.online_quantization import OnlineQuantization, check_format
from l4jax.checkpoint.output_folder import open_unquantized, write_atomically
from l4jax.checkpoint.parameters import THREADS, make_progress_bar
from l4jax.checkpoint.quantized_reader import WORD_VALUES
from l4jax.checkpoint.recipe import Recipe, Source, read_box
from l4jax.checkpoint.safetensors import (
    INDEX,
    Index,
    TensorSpec,
    count_bytes,
    stream_safetensors,
)
from l4jax.config import INT4_GROUP
from l4jax.kernels.formats import quantize_fp8, quantize_int4

SHARD_BYTES = 5 * 10**9  # of a file, at most, as in transformers' checkpoints


@dataclasses.dataclass(frozen=True)
class _Output:
    """Tensors that are written together: a copy of one, or the data and scales of a matrix.

    Attributes:
        specs: name -> (dtype, shape).
        recipe: of the parameter that they belong to, from the source's tensors.
        matrix: the box of the parameter that is quantized; None for a copy.
        is_last: whether no later output reads the tensors of the recipe.
        format: "fp8" or "int4", of the matrix.
    """

    specs: Mapping[str, TensorSpec]
    recipe: Recipe
    matrix: Source | None
    is_last: bool
    format: str

    @property
    def nbytes(self) -> int:
        return sum(map(count_bytes, self.specs.values()))


def quantize_folder(
    source: str | Path,
    folder: str | Path,
    quantization: str = "fp8",
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write a model as a quantized checkpoint under the published names, with its other files.

    Experts are written one by one. "fp8": e4m3 `[out, in]` with BF16 scales `[out, 1]`, amax / 448.
    "int4": words of eight values `[out, in / 8]` with BF16 scales `[out, in / 128]`, amax / 7. Host
    memory holds one expert's matrix a few times (0.5 GB), or one tensor that is copied. An
    interrupted conversion leaves `folder` as before.

    Args:
        source: a folder with safetensors under the published names, not quantized.
        folder: to be made; one that is not empty is refused.
        quantization: "fp8" or "int4".
        overwrite: replace `folder`, once all is written.
        progress: whether to show a bar on standard error.

    Returns:
        The bytes of the tensors.

    Raises:
        CheckpointError: no checkpoint, or quantized; a matrix that groups of int4 do not divide;
            `folder` is not empty; the disk is full.
    """
    source, folder = Path(source), Path(folder).absolute()
    check_format(quantization)
    online_quantization = OnlineQuantization(quantization, includes_attention=False)
    index, recipes, _ = open_unquantized(source, folder, overwrite=overwrite)
    outputs = [
        output
        for path, recipe in recipes.items()
        for output in _list_outputs(index, path, recipe, online_quantization)
    ]
    shards = _split_shards(outputs)
    total = sum(output.nbytes for output in outputs)
    cpu = jax.local_devices(backend="cpu")[0]
    with (
        make_progress_bar(total, "quantizing", progress) as bar,
        ThreadPoolExecutor(THREADS) as pool,
        jax.default_device(cpu),
        write_atomically(source, folder, total) as unfinished,
    ):
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            numbered = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = numbered if len(shards) > 1 else "model.safetensors"
            specs = {name: spec for output in shard for name, spec in output.specs.items()}
            weight_map |= dict.fromkeys(specs, file)
            stream_safetensors(unfinished / file, specs, _make_tensors(index, shard, pool, bar))
        if len(shards) > 1:
            _write_json(
                unfinished / INDEX,
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        # Existing files are not copied from `source` afterwards.
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = _format_quantization_config(outputs, quantization)
        _write_json(unfinished / "config.json", config)
    return total


def _list_outputs(
    index: Index, path: str, recipe: Recipe, online_quantization: OnlineQuantization
) -> Iterator[_Output]:
    """List the outputs of a parameter, in order."""
    format = online_quantization.format
    if online_quantization.count_in_axes(path) is None:
        for source in recipe.sources:
            copied = Recipe((source,), source.shape)
            specs = {source.name: index.specs[source.name]}
            yield _Output(specs, copied, None, is_last=True, format=format)
        return
    matrices = make_unfused_recipe(path, recipe.parameter_shape, index.tensors).sources
    for matrix in matrices:
        specs = _list_fp8(matrix) if format == "fp8" else _list_int4(matrix, index.folder)
        yield _Output(specs, recipe, matrix, is_last=matrix is matrices[-1], format=format)


def _list_fp8(matrix: Source) -> dict[str, TensorSpec]:
    """List the tensors of an fp8 matrix, in the order in which `_quantize` returns them."""
    return {
        matrix.name: ("F8_E4M3", matrix.stored_shape),
        matrix.name + "_scale": ("BF16", (matrix.stored_shape[0], 1)),
    }


def _list_int4(matrix: Source, folder: Path) -> dict[str, TensorSpec]:
    """List the tensors of an int4 matrix, in the order in which `_quantize` returns them."""
    rows, columns = matrix.stored_shape
    if columns % INT4_GROUP:
        raise CheckpointError(
            f"{folder}: {matrix.name} has {columns} columns, which groups of {INT4_GROUP} do not "
            "divide, as int4 needs them: quantize it to fp8."
        )
    return {
        matrix.name + "_packed": ("I32", (rows, columns // WORD_VALUES)),
        matrix.name + "_scale": ("BF16", (rows, columns // INT4_GROUP)),
        matrix.name + "_shape": ("I64", (2,)),
    }


def _split_shards(outputs: Sequence[_Output]) -> list[list[_Output]]:
    """Split outputs into files, in order, each as full as `SHARD_BYTES` allows."""
    shards: list[list[_Output]] = []
    left = 0
    for output in outputs:
        if not shards or output.nbytes > left:
            shards.append([])
            left = SHARD_BYTES
        shards[-1].append(output)
        left -= output.nbytes
    return shards


def _make_tensors(
    index: Index, outputs: Sequence[_Output], pool: Executor, bar: Any
) -> Iterator[np.ndarray]:
    """Make the tensors of outputs, one output at a time."""
    for output in outputs:
        if output.matrix is None:
            yield from map(index.view, output.specs)
        else:
            yield from _quantize(index, output, output.matrix, pool)
        if output.is_last:
            index.release(source.name for source in output.recipe.sources)
        bar.update(output.nbytes)


def _quantize(index: Index, output: _Output, matrix: Source, pool: Executor) -> list[np.ndarray]:
    """Quantize a matrix to the tensors that `_list_fp8` or `_list_int4` lists."""
    recipe = output.recipe
    box = tuple(slice(at, at + size) for at, size in zip(matrix.start, matrix.shape, strict=True))
    dtypes = {index.tensors[source.name].dtype for source in recipe.sources}
    dtype = ml_dtypes.bfloat16 if dtypes == {"BF16"} else np.float32
    box = recipe.to_file_order(box)
    values = read_box(recipe, index.view, box, dtype, pool, index.release)
    data, scale = _quantize_matrix(values, recipe.file_axes, matrix.stored_shape, output.format)
    tensors = [np.asarray(data), np.asarray(scale)]
    if output.format == "int4":
        tensors.append(np.array(matrix.stored_shape, np.int64))
    return tensors


@functools.partial(jax.jit, static_argnames=("permutation", "shape", "format"))
def _quantize_matrix(
    values: Any, permutation: tuple[int, ...], shape: tuple[int, ...], format: str
) -> Any:
    """Quantize a matrix, with scales that are rounded to BF16 first to fit the stored ones."""
    matrix = jnp.transpose(values, permutation).reshape(shape)
    if format == "int4":
        quantized = quantize_int4(matrix, INT4_GROUP, jnp.bfloat16)
        return _pack_int4(quantized.data), quantized.scale.astype(jnp.bfloat16)
    quantized = quantize_fp8(matrix, 1, jnp.bfloat16)
    return quantized.data, quantized.scale[:, None].astype(jnp.bfloat16)


def _pack_int4(values: jax.Array) -> jax.Array:
    """Pack int4 values into int32 words, 8 of the last axis each: plus 8, the first one lowest."""
    nibbles = (values.astype(jnp.int32) + 8).reshape(*values.shape[:-1], -1, WORD_VALUES)
    shifted = nibbles.astype(jnp.uint32) << (4 * jnp.arange(WORD_VALUES, dtype=jnp.uint32))
    return jax.lax.bitcast_convert_type(shifted.sum(-1, dtype=jnp.uint32), jnp.int32)


def _format_quantization_config(outputs: Sequence[_Output], format: str) -> dict[str, Any]:
    """Format `quantization_config`, key for key as llm-compressor writes FP8_DYNAMIC or W4A16."""
    quantized = {name for output in outputs if output.matrix for name in output.specs}
    specs = {name: spec for output in outputs for name, spec in output.specs.items()}
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
    if format == "int4":
        weights |= {"group_size": INT4_GROUP, "num_bits": 4, "strategy": "group", "type": "int"}
    group = {
        "input_activations": inputs if format == "fp8" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized" if format == "fp8" else "pack-quantized",
        "global_compression_ratio": None,
        "ignore": [name for name in list_linears(specs) if f"{name}.weight" not in quantized],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
