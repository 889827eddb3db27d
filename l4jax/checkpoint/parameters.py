"""Loading: parameters from safetensors to devices, each device reading its own slices only."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from tqdm import tqdm

from l4jax.checkpoint.adapter import Adapter
from l4jax.checkpoint.errors import CheckpointError, list_few
from l4jax.checkpoint.names import detect_quantization, map_kv_scales, match_tensors
from l4jax.checkpoint.online_quantization import OnlineQuantization
from l4jax.checkpoint.quantized_reader import (
    NVFP4_GROUP_SIZE,
    WORD_VALUES,
    Nvfp4Recipe,
    QuantizedRecipe,
    check_int4_metadata,
    check_unused_tensors,
    dequantize_nvfp4,
    make_scale_view,
    unpack_int4,
)
from l4jax.checkpoint.recipe import Box, Recipe, read_box
from l4jax.checkpoint.safetensors import Index
from l4jax.config import Config
from l4jax.kernels.formats import Quantized
from l4jax.model import Parameters, declare_parameters

AnyRecipe = Recipe | QuantizedRecipe | Nvfp4Recipe
# Logical names of an array's axes -> its sharding.
Place = Callable[[tuple[str, ...]], Sharding]
# Threads that copy out of the mapped files: one alone saturates neither a disk nor host memory.
THREADS = 8
DECODED_VALUES = 2**22  # 4-bit values that are decoded at a time, 30 bytes each meanwhile


def load_parameters(
    folder: str | Path,
    config: Config,
    dtype: Any,
    place: Place,
    *,
    online_quantization: OnlineQuantization | None = None,
    lora: Adapter | None = None,
    progress: bool = True,
) -> Parameters:
    """Load a checkpoint in the published layout, quantized or not, onto devices.

    Host memory holds one slice that is being read and one that is being transferred. While a device
    transposes an expert matrix, it holds its slice twice. With online quantization, one parameter
    at a time is on the devices in `dtype`; the program that quantizes it transposes it, too.

    Args:
        folder: with safetensors under the published names.
        config: of the model; every parameter that it declares is filled, every stored tensor used.
        dtype: of the parameters; values stored in another are converted slice by slice.
        place: logical names of an array's axes, in any order -> its sharding.
        online_quantization: the format to quantize to; a checkpoint that has it already is loaded
            as it is.
        lora: an adapter, merged before weights are quantized.
        progress: whether to show a bar on standard error.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown, damaged or quantized.
    """
    index = Index.open(folder)
    recipes, names = make_recipes(index, config)
    if lora:
        _refuse_quantized_base(index, recipes, lora)
    if online_quantization and _is_quantized(index, recipes, online_quantization):
        online_quantization = None
    loaded: dict[str, Any] = {}
    sizes = {
        path: sum(index.tensors[source.name].nbytes for source in recipe.sources)
        for path, recipe in recipes.items()
    }
    with (
        make_progress_bar(sum(sizes.values()), "loading", progress) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for count, (path, recipe) in enumerate(recipes.items(), start=1):
            in_axes = online_quantization.count_in_axes(path) if online_quantization else None
            if online_quantization is None or in_axes is None:
                loaded[path] = load_parameter(
                    index, recipe, names[path], dtype, place, pool, path=path, lora=lora
                )
            else:
                assert isinstance(recipe, Recipe)
                array = _load_in_file_order(index, recipe, names[path], dtype, place, pool)
                array = lora.merge(path, array, recipe.permutation) if lora else array
                loaded[path] = online_quantization.quantize(
                    array, in_axes, names[path], place, recipe.permutation
                )
            bar.set_postfix_str(f"{count}/{len(recipes)} parameters", refresh=False)
            bar.update(sizes[path])
        jax.block_until_ready(loaded)
    return unflatten(loaded)


def load_kv_scales(folder: str | Path, config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    """Load the scales that divide cached keys and values: two of [layers] float32.

    Returns:
        None if the checkpoint has no scales.

    Raises:
        CheckpointError: some layers have scales and others lack them.
    """
    index = Index.open(folder)
    names = map_kv_scales(index.specs)
    if not names:
        return None
    wanted = [(tensor, layer) for tensor in "kv" for layer in range(config.text.layers)]
    missing = [f"{tensor}_scale of layer {i}" for tensor, i in wanted if (tensor, i) not in names]
    if missing:
        raise CheckpointError(
            f"{folder} has scales for an fp8 KV cache, but lacks {list_few(missing)}."
        )
    scales = [float(index.view(names[key]).astype(np.float32).reshape(())) for key in wanted]
    k_scale, v_scale = np.array(scales, np.float32).reshape(2, -1)
    return k_scale, v_scale


def make_recipes(
    index: Index, config: Config
) -> tuple[dict[str, AnyRecipe], dict[str, tuple[str, ...]]]:
    """Make the recipe of each parameter, in the order of the files; and name the axes.

    Returns:
        path -> recipe; path -> logical names of the parameter's axes.
    """
    shapes, names = declare_parameters(config, jnp.float32)
    wanted = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    files = {name: str(tensor.path) for name, tensor in index.tensors.items()}
    recipes = match_tensors(wanted, index.specs, str(index.folder), files)

    def get_offset(path: str) -> tuple[Path, int]:
        tensor = index.tensors[recipes[path].sources[0].name]
        return tensor.path, tensor.begin

    ordered = {path: recipes[path] for path in sorted(recipes, key=get_offset)}
    return ordered, flatten(names)


def load_parameter(
    index: Index,
    recipe: AnyRecipe,
    names: tuple[str, ...],
    dtype: Any,
    place: Place,
    pool: Executor,
    *,
    path: str = "",
    lora: Adapter | None = None,
) -> Any:
    """Load one parameter; the transfer of its last slice may be pending on return.

    Args:
        path: of the parameter, by which an adapter finds its factors.
        lora: an adapter to merge; quantized parameters are not merged.
    """
    if isinstance(recipe, QuantizedRecipe):
        return _load_quantized(index, recipe, names, place, pool)
    if isinstance(recipe, Nvfp4Recipe):
        return _load_nvfp4(index, recipe, names, dtype, place, pool)
    array = _load_in_file_order(index, recipe, names, dtype, place, pool)
    array = lora.merge(path, array, recipe.permutation) if lora else array
    return _transpose(array, recipe, place(names))


def _transpose(array: jax.Array, recipe: Recipe, sharding: Sharding) -> jax.Array:
    """Transpose a parameter from the files' layout to the model's; delete the original if it
    differs."""
    if recipe.permutation is None:
        return array
    transposed = _compile_transpose(recipe.permutation, sharding)(array)
    # Not donated: XLA reuses a buffer for an output of the same shape only. Deleted explicitly.
    transposed.block_until_ready()
    array.delete()
    return transposed


def _load_in_file_order(
    index: Index,
    recipe: Recipe,
    names: tuple[str, ...],
    dtype: Any,
    place: Place,
    pool: Executor,
) -> jax.Array:
    """Load an unquantized parameter, its axes in the files' order."""
    array = _load_array(index, recipe, place(recipe.to_file_order(names)), dtype, pool)
    index.release(source.name for source in recipe.sources)
    return array


def _refuse_quantized_base(index: Index, recipes: Mapping[str, AnyRecipe], lora: Adapter) -> None:
    """Refuse an adapter of quantized parameters: the sum would have to be quantized again."""
    quantized = [path for path in lora.factors if not isinstance(recipes[path], Recipe)]
    if quantized:
        raise CheckpointError(
            f"{index.folder} is quantized already ({detect_quantization(index.specs)}), and "
            f"{lora.origin} adapts {list_few(quantized)}: take the BF16 checkpoint, and quantize "
            "while it is loaded."
        )


def _is_quantized(
    index: Index, recipes: Mapping[str, AnyRecipe], online_quantization: OnlineQuantization
) -> bool:
    """Whether a checkpoint is quantized already; another format than the requested is refused."""
    formats = {recipe.format for recipe in recipes.values() if not isinstance(recipe, Recipe)}
    if formats - {online_quantization.format}:
        raise CheckpointError(
            f"{index.folder} is quantized already ({detect_quantization(index.specs)}), and cannot "
            f"be made {online_quantization.format}: leave quantization out, or take the BF16 "
            "checkpoint."
        )
    return bool(formats)


def _load_quantized(
    index: Index, recipe: QuantizedRecipe, names: tuple[str, ...], place: Place, pool: Executor
) -> Quantized:
    """Load data and scales as they are stored, each device its own slices of both."""
    sharding = place(names)
    check_unused_tensors(index, [source.name for source in recipe.data.sources])
    if recipe.is_packed:
        check_int4_metadata(index, [source.name for source in recipe.data.sources])
        data = _load_int4(index, recipe, sharding, pool)
    else:
        in_file = place(recipe.data.to_file_order(names))
        data = _load_array(index, recipe.data, in_file, ml_dtypes.float8_e4m3fn, pool)
        data = _transpose(data, recipe.data, sharding)
    scale = _load_array(
        index,
        recipe.scale,
        place(names[: len(recipe.scale.shape)]),
        index.view(recipe.scale.sources[0].name).dtype,
        pool,
        view=make_scale_view(index, recipe.scale),
    )
    index.release(source.name for source in recipe.sources)
    return Quantized(data, scale)


def make_progress_bar(total: int, description: str, progress: bool) -> tqdm:
    """Make a progress bar in bytes on standard error, shown by the first process alone."""
    shown = progress and jax.process_index() == 0
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        disable=not shown,
        dynamic_ncols=True,
        leave=True,
    )


def _load_nvfp4(
    index: Index,
    recipe: Nvfp4Recipe,
    names: tuple[str, ...],
    dtype: Any,
    place: Place,
    pool: Executor,
) -> jax.Array:
    """Load an nvfp4 parameter in `dtype`, each device its own slices, dequantized on the host."""
    data, in_axis = recipe.data, recipe.in_axis
    view_global = make_scale_view(index, recipe.global_scale)

    def decode(box: Box) -> np.ndarray:
        bytes_box = _shrink_box(box, 2, in_axis)
        groups_box = _shrink_box(box, NVFP4_GROUP_SIZE, in_axis)
        packed = read_box(data, index.view, bytes_box, np.uint8, pool, index.release)
        scale = read_box(recipe.scale, index.view, groups_box, ml_dtypes.float8_e4m3fn, pool)
        global_scale = read_box(recipe.global_scale, view_global, groups_box, np.float32, pool)
        return dequantize_nvfp4(
            packed, scale, global_scale, is_multiplier=recipe.is_multiplier, in_axis=in_axis
        )

    shape = (*data.shape[:in_axis], 2 * data.shape[in_axis], *data.shape[in_axis + 1 :])
    in_file = place(data.to_file_order(names))
    read = functools.partial(_decode_in_blocks, decode, dtype, in_axis)
    array = _load_slices(index, data, shape, in_file, NVFP4_GROUP_SIZE, read, in_axis)
    index.release(source.name for source in recipe.sources)
    return _transpose(array, data, place(names))


def _load_int4(
    index: Index, recipe: QuantizedRecipe, sharding: Sharding, pool: Executor
) -> jax.Array:
    """Load int4 values, each device its own slices, unpacked from words on the host."""
    data, groups = recipe.data, recipe.scale.shape[-1]

    def decode(box: Box) -> np.ndarray:
        words_box = _shrink_box(box, WORD_VALUES)
        return unpack_int4(read_box(data, index.view, words_box, np.int32, pool, index.release))

    shape = (*data.shape[:-1], WORD_VALUES * data.shape[-1])
    read = functools.partial(_decode_in_blocks, decode, ml_dtypes.int4, len(shape) - 1)
    unit = math.lcm(WORD_VALUES, shape[-1] // groups)
    return _load_slices(index, data, shape, sharding, unit, read)


def _decode_in_blocks(
    decode: Callable[[Box], np.ndarray], dtype: Any, in_axis: int, box: Box
) -> np.ndarray:
    """Decode a box block by block: decoding takes many times the bytes of its result."""
    values = np.empty([cut.stop - cut.start for cut in box], dtype)
    for block in _split_box(box, in_axis):
        inside = zip(block, box, strict=True)
        target = tuple(slice(cut.start - x.start, cut.stop - x.start) for cut, x in inside)
        values[target] = decode(block)
    return values


def _split_box(box: Box, in_axis: int) -> Iterator[Box]:
    """Split a box into blocks of at most `DECODED_VALUES`, if cuts across other axes than `in_axis`
    suffice."""
    sizes = [cut.stop - cut.start for cut in box]
    axis = next((axis for axis, size in enumerate(sizes) if size > 1 and axis != in_axis), None)
    if axis is None or math.prod(sizes) <= DECODED_VALUES:
        yield box
        return
    middle = box[axis].start + sizes[axis] // 2
    for half in (slice(box[axis].start, middle), slice(middle, box[axis].stop)):
        yield from _split_box((*box[:axis], half, *box[axis + 1 :]), in_axis)


def _load_array(
    index: Index,
    recipe: Recipe,
    sharding: Sharding,
    dtype: Any,
    pool: Executor,
    view: Callable[[str], np.ndarray] | None = None,
) -> jax.Array:
    """Load the array of a recipe, its axes in the files' order, onto devices.

    Args:
        view: replaces `index.view`.
    """

    def read(box: Box) -> np.ndarray:
        return read_box(recipe, view or index.view, box, dtype, pool, index.release)

    return _load_slices(index, recipe, recipe.shape, sharding, 1, read)


def _load_slices(
    index: Index,
    recipe: Recipe,
    shape: tuple[int, ...],
    sharding: Sharding,
    unit: int,
    read: Callable[[Box], np.ndarray],
    axis: int = -1,
) -> jax.Array:
    """Read each distinct slice once and put it on all of its devices, one slice after another.

    `jax.make_array_from_callback` would hold all slices of an array in host memory at a time.

    Args:
        unit: the number of neighbors along `axis` that the file keeps together (a word, a group):
            slices must not cut through them.
        axis: of the array.
    """
    devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, box in sharding.addressable_devices_indices_map(shape).items():
        assert box is not None
        spans = [cut.indices(size)[:2] for cut, size in zip(box, shape, strict=True)]
        if any(at % unit for at in spans[axis]):
            raise CheckpointError(
                f"{index.folder}: {recipe.sources[0].name} keeps {unit} values together, and "
                f"{len(sharding.device_set)} devices would cut through them: take fewer devices."
            )
        devices_of.setdefault(tuple(spans), []).append(device)
    slices: list[jax.Array] = []
    for spans, devices in devices_of.items():
        values = read(tuple(slice(*span) for span in spans))
        jax.block_until_ready(slices)  # one pending transfer at most
        slices += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, slices)


def _shrink_box(box: Box, factor: int, axis: int = -1) -> Box:
    """Shrink a box of values to the box of elements that hold `factor` of them along an axis."""
    cuts = list(box)
    cuts[axis] = slice(cuts[axis].start // factor, cuts[axis].stop // factor)
    return tuple(cuts)


def check_finite(params: Parameters, folder: str | Path) -> None:
    """Refuse weights that are not finite: a reduction of each on its devices, read once.

    Raises:
        CheckpointError: naming the parameters.
    """
    flags = {
        path: [_is_finite(leaf) for leaf in jax.tree.leaves(weight) if leaf.dtype != jnp.int4]
        for path, weight in flatten(params).items()
    }
    wrong = [path for path, its_flags in jax.device_get(flags).items() if not all(its_flags)]
    if wrong:
        raise CheckpointError(
            f"{folder} has weights that are not finite (NaN or infinity) in {list_few(wrong)}: "
            "download or convert it again, and check its adapter if it has one."
        )


def _is_finite(array: jax.Array) -> Any:
    """Return whether an array is finite, as a flag on its devices.

    numpy reads the memory of CPU devices: compiling a reduction for each shape takes a second.
    """
    if next(iter(array.sharding.device_set)).platform != "cpu":
        return _reduce_finite(array)
    shards = (shard.data for shard in array.addressable_shards if shard.replica_id == 0)
    return all(np.isfinite(np.asarray(shard)).all() for shard in shards)


@jax.jit
def _reduce_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def flatten(tree: Any) -> dict[str, Any]:
    """Flatten a tree of dictionaries to path -> leaf, as in "text/layer_3/attention/qkv"."""
    return dict(flatten_dict(tree, sep="/"))


def unflatten(leaves: Mapping[str, Any]) -> Parameters:
    """Make the tree of dictionaries that `flatten` flattens to these leaves."""
    return dict(unflatten_dict(dict(leaves), sep="/"))


@functools.cache
def _compile_transpose(
    permutation: tuple[int, ...], sharding: Sharding
) -> Callable[[jax.Array], jax.Array]:
    """Compile a transposition without communication: the sharding is transposed with the axes."""
    return jax.jit(functools.partial(jnp.transpose, axes=permutation), out_shardings=sharding)
