"""From safetensors to arrays on devices: each device gets its own slice, and no more is read."""

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
from l4jax.checkpoint.names import find_kv_scales, find_quantization, match
from l4jax.checkpoint.online_quantization import OnlineQuantization
from l4jax.checkpoint.quantize import (
    FP4_GROUP,
    WORD,
    Nvfp4Recipe,
    QuantizedRecipe,
    check_beside,
    decode_nvfp4,
    make_scale_view,
    unpack,
)
from l4jax.checkpoint.recipe import Box, Recipe, read_box
from l4jax.checkpoint.safetensors import Index
from l4jax.config import Config
from l4jax.kernels.formats import Quantized
from l4jax.model import Parameters, declare_parameters

AnyRecipe = Recipe | QuantizedRecipe | Nvfp4Recipe
Place = Callable[[tuple[str, ...]], Sharding]
# That copy out of the mapped files: one alone fills neither a disk nor the memory's bandwidth.
THREADS = 8
DECODED = 2**22  # values of 4 bits that are decoded at a time, of 30 bytes each on the way


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
    """Load a checkpoint in the published layout, plain or sharded, onto devices.

    Host memory holds one slice that is being read and one that is on its way. While an expert
    matrix is transposed, a device holds its slice of that twice. Of the parameters that are
    quantized, one at a time is on the devices in `dtype`, transposed in the program that quantizes.

    Args:
        folder: with safetensors under the published names.
        config: of the model; every parameter that it declares is filled, every stored tensor used.
        dtype: of the parameters; what is stored in another is converted slice by slice.
        place: the sharding of an array whose axes have these logical names, in any order of axes.
        online_quantization: what to quantize, and how; a checkpoint already in that format is
            loaded as it is.
        lora: an adapter, merged before anything is quantized.
        progress: whether to show a bar on standard error.

    Raises:
        CheckpointError: naming what is missing, superfluous, damaged or quantized.
    """
    index = Index.open(folder)
    recipes, names = find_recipes(index, config)
    if lora:
        _check_plain(index, recipes, lora)
    if online_quantization and _is_narrow(index, recipes, online_quantization):
        online_quantization = None
    loaded: dict[str, Any] = {}
    sizes = {
        path: sum(index.tensors[part.name].nbytes for part in recipe.parts)
        for path, recipe in recipes.items()
    }
    with (
        make_bar(sum(sizes.values()), "loading", progress) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for count, (path, recipe) in enumerate(recipes.items(), start=1):
            inner = online_quantization.count_inner(path) if online_quantization else None
            if online_quantization is None or inner is None:
                loaded[path] = load_parameter(
                    index, recipe, names[path], dtype, place, pool, path=path, lora=lora
                )
            else:
                assert isinstance(recipe, Recipe)
                wide = _read_parameter(index, recipe, names[path], dtype, place, pool)
                wide = lora.merge(path, wide, recipe.order) if lora else wide
                loaded[path] = online_quantization.quantize(
                    wide, inner, names[path], place, recipe.order
                )
            bar.set_postfix_str(f"{count}/{len(recipes)} parameters", refresh=False)
            bar.update(sizes[path])
        jax.block_until_ready(loaded)
    return unflatten(loaded)


def load_kv_scales(folder: str | Path, config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    """What cached keys and values are divided by: two of [layers] float32; None if nobody says.

    Raises:
        CheckpointError: where some layers have scales and others lack them.
    """
    index = Index.open(folder)
    names = find_kv_scales(index.kinds)
    if not names:
        return None
    wanted = [(kind, layer) for kind in "kv" for layer in range(config.text.layers)]
    missing = [f"{kind}_scale of layer {i}" for kind, i in wanted if (kind, i) not in names]
    if missing:
        raise CheckpointError(
            f"{folder} has scales for an fp8 KV cache, but lacks {list_few(missing)}."
        )
    scales = [float(index.view(names[key]).astype(np.float32).reshape(())) for key in wanted]
    k_scale, v_scale = np.array(scales, np.float32).reshape(2, -1)
    return k_scale, v_scale


def find_recipes(
    index: Index, config: Config
) -> tuple[dict[str, AnyRecipe], dict[str, tuple[str, ...]]]:
    """How to make each parameter, in the order of the files; and the logical names of its axes."""
    shapes, names = declare_parameters(config, jnp.float32)
    wanted = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    files = {name: str(tensor.path) for name, tensor in index.tensors.items()}
    recipes = match(wanted, index.kinds, str(index.folder), files)

    def lies_at(path: str) -> tuple[Path, int]:
        tensor = index.tensors[recipes[path].parts[0].name]
        return tensor.path, tensor.begin

    ordered = {path: recipes[path] for path in sorted(recipes, key=lies_at)}
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
    """Load one parameter; the last of its slices may still be on the way when it is returned.

    Args:
        path: of the parameter, by which an adapter knows it.
        lora: what is merged into it; into none that is quantized.
    """
    if isinstance(recipe, QuantizedRecipe):
        return _load_quantized(index, recipe, names, place, pool)
    if isinstance(recipe, Nvfp4Recipe):
        return _load_nvfp4(index, recipe, names, dtype, place, pool)
    array = _read_parameter(index, recipe, names, dtype, place, pool)
    array = lora.merge(path, array, recipe.order) if lora else array
    return _turn(array, recipe, place(names))


def _turn(array: jax.Array, recipe: Recipe, sharding: Sharding) -> jax.Array:
    """A parameter as we have it, of one as the file has it, which is freed if it differs."""
    if recipe.order is None:
        return array
    turned = _make_turn(recipe.order, sharding)(array)
    # Not donated: XLA reuses a buffer for an output of the same shape only. Freed by hand.
    turned.block_until_ready()
    array.delete()
    return turned


def _read_parameter(
    index: Index,
    recipe: Recipe,
    names: tuple[str, ...],
    dtype: Any,
    place: Place,
    pool: Executor,
) -> jax.Array:
    """A parameter as the file has it, not yet transposed."""
    array = _read_array(index, recipe, place(recipe.reorder(names)), dtype, pool)
    index.release(part.name for part in recipe.parts)
    return array


def _check_plain(index: Index, recipes: Mapping[str, AnyRecipe], lora: Adapter) -> None:
    """Refuse an adapter of what is stored in fewer bits: the sum would have to be rounded anew."""
    quantized = [path for path in lora.factors if not isinstance(recipes[path], Recipe)]
    if quantized:
        raise CheckpointError(
            f"{index.folder} is quantized already ({find_quantization(index.kinds)}), and "
            f"{lora.origin} adapts {list_few(quantized)}: take the BF16 checkpoint, and quantize "
            "while it is loaded."
        )


def _is_narrow(
    index: Index, recipes: Mapping[str, AnyRecipe], online_quantization: OnlineQuantization
) -> bool:
    """Whether a checkpoint is quantized already, which has to be in the format asked for."""
    forms = {
        "nvfp4" if isinstance(recipe, Nvfp4Recipe) else "int4" if recipe.is_packed else "fp8"
        for recipe in recipes.values()
        if not isinstance(recipe, Recipe)
    }
    if forms - {online_quantization.format}:
        raise CheckpointError(
            f"{index.folder} is quantized already ({find_quantization(index.kinds)}), and cannot "
            f"be made {online_quantization.format}: leave quantization out, or take the BF16 "
            "checkpoint."
        )
    return bool(forms)


def _load_quantized(
    index: Index, recipe: QuantizedRecipe, names: tuple[str, ...], place: Place, pool: Executor
) -> Quantized:
    """Data and scales as they are stored; each device its own slices of both."""
    sharding = place(names)
    if recipe.is_packed:
        check_beside(index, [part.name for part in recipe.data.parts])
        data = _read_int4(index, recipe, sharding, pool)
    else:
        in_file = place(recipe.data.reorder(names))
        data = _read_array(index, recipe.data, in_file, ml_dtypes.float8_e4m3fn, pool)
        data = _turn(data, recipe.data, sharding)
    scale = _read_array(
        index,
        recipe.scale,
        place(names[: len(recipe.scale.shape)]),
        index.view(recipe.scale.parts[0].name).dtype,
        pool,
        view=make_scale_view(index, recipe.scale),
    )
    index.release(part.name for part in recipe.parts)
    return Quantized(data, scale)


def make_bar(total: int, what: str, progress: bool) -> tqdm:
    """A progress bar in bytes on standard error, of the first process alone."""
    shown = progress and jax.process_index() == 0
    return tqdm(
        total=total,
        desc=what,
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
    """The values that nvfp4 stands for, each device its own slices, computed on the host."""
    axis = recipe.axis

    def decode(box: Box) -> np.ndarray:
        half, few = _narrow_box(box, 2, axis), _narrow_box(box, FP4_GROUP, axis)
        packed = read_box(recipe.data, index.view, half, np.uint8, pool, index.release)
        scale = read_box(recipe.scale, index.view, few, ml_dtypes.float8_e4m3fn, pool)
        whole = read_box(recipe.whole, make_scale_view(index, recipe.whole), few, np.float32, pool)
        return decode_nvfp4(packed, scale, whole, multiplies=recipe.multiplies, axis=axis)

    data = recipe.data
    shape = (*data.shape[:axis], 2 * data.shape[axis], *data.shape[axis + 1 :])
    in_file = place(data.reorder(names))
    read = functools.partial(_read_in_pieces, decode, dtype, axis)
    array = _put_slices(index, data, shape, in_file, FP4_GROUP, read, axis)
    index.release(part.name for part in recipe.parts)
    return _turn(array, data, place(names))


def _read_int4(
    index: Index, recipe: QuantizedRecipe, sharding: Sharding, pool: Executor
) -> jax.Array:
    """int4 values, each device its own slices, taken out of their words on the host."""
    data, groups = recipe.data, recipe.scale.shape[-1]

    def decode(box: Box) -> np.ndarray:
        words = _narrow_box(box, WORD)
        return unpack(read_box(data, index.view, words, np.int32, pool, index.release))

    shape = (*data.shape[:-1], WORD * data.shape[-1])
    read = functools.partial(_read_in_pieces, decode, ml_dtypes.int4, len(shape) - 1)
    unit = math.lcm(WORD, shape[-1] // groups)
    return _put_slices(index, data, shape, sharding, unit, read)


def _read_in_pieces(
    decode: Callable[[Box], np.ndarray], dtype: Any, axis: int, box: Box
) -> np.ndarray:
    """A box of what has to be decoded: piece by piece, since that takes many times its bytes."""
    values = np.empty([cut.stop - cut.start for cut in box], dtype)
    for piece in _halve(box, axis):
        inside = zip(piece, box, strict=True)
        target = tuple(slice(cut.start - x.start, cut.stop - x.start) for cut, x in inside)
        values[target] = decode(piece)
    return values


def _halve(box: Box, axis: int) -> Iterator[Box]:
    """A box in pieces of `DECODED` values at most, as far as cuts across other axes can do it."""
    sizes = [cut.stop - cut.start for cut in box]
    at = next((at for at, size in enumerate(sizes) if size > 1 and at != axis), None)
    if at is None or math.prod(sizes) <= DECODED:
        yield box
        return
    middle = box[at].start + sizes[at] // 2
    for half in (slice(box[at].start, middle), slice(middle, box[at].stop)):
        yield from _halve((*box[:at], half, *box[at + 1 :]), axis)


def _read_array(
    index: Index,
    recipe: Recipe,
    sharding: Sharding,
    dtype: Any,
    pool: Executor,
    view: Callable[[str], np.ndarray] | None = None,
) -> jax.Array:
    """The array of a recipe, in the order of the file, on devices.

    Args:
        view: in place of the index's own.
    """

    def read(box: Box) -> np.ndarray:
        return read_box(recipe, view or index.view, box, dtype, pool, index.release)

    return _put_slices(index, recipe, recipe.shape, sharding, 1, read)


def _put_slices(
    index: Index,
    recipe: Recipe,
    shape: tuple[int, ...],
    sharding: Sharding,
    unit: int,
    read: Callable[[Box], np.ndarray],
    axis: int = -1,
) -> jax.Array:
    """Read each distinct slice once and put it on all devices that want it; then the next.

    `jax.make_array_from_callback` would have all slices of an array in host memory at a time.

    Args:
        unit: how many stand together in the file along an axis: no device may have a part of them.
        axis: that one.
    """
    takers: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, box in sharding.addressable_devices_indices_map(shape).items():
        assert box is not None
        spans = [cut.indices(size)[:2] for cut, size in zip(box, shape, strict=True)]
        if any(at % unit for at in spans[axis]):
            raise CheckpointError(
                f"{index.folder}: {recipe.parts[0].name} keeps {unit} values together, and "
                f"{len(sharding.device_set)} devices would cut through them: take fewer devices."
            )
        takers.setdefault(tuple(spans), []).append(device)
    pieces: list[jax.Array] = []
    for spans, devices in takers.items():
        values = read(tuple(slice(*span) for span in spans))
        jax.block_until_ready(pieces)  # so that no more than the last slice is still on its way
        pieces += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _narrow_box(box: Box, factor: int, axis: int = -1) -> Box:
    """A box of values as one of what holds `factor` of them along an axis."""
    cuts = list(box)
    cuts[axis] = slice(cuts[axis].start // factor, cuts[axis].stop // factor)
    return tuple(cuts)


def flatten(tree: Any) -> dict[str, Any]:
    """A tree of dictionaries as path -> leaf, as in "text/layer_3/attention/qkv"."""
    return dict(flatten_dict(tree, sep="/"))


def unflatten(leaves: Mapping[str, Any]) -> Parameters:
    """The tree that `flatten` came from."""
    return dict(unflatten_dict(dict(leaves), sep="/"))


@functools.cache
def _make_turn(order: tuple[int, ...], sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """A transposition in which no device needs what another has: the sharding turns along."""
    return jax.jit(functools.partial(jnp.transpose, axes=order), out_shardings=sharding)
