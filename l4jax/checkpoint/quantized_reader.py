"""Quantized checkpoints: the stored tensors that make up a parameter's data and scales.

The format is read off the tensors. fp8: an fp8 `weight` with a `weight_scale`. int4:
`weight_packed` of 32-bit words. nvfp4: `weight_packed` of bytes, or, from ModelOpt, a `weight` of
bytes with a `weight_scale_2`. Any set of layers may be quantized. Scales of activations
(`input_scale`) are not read: activations are quantized with dynamic scales, per token.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.recipe import Recipe, Source
from l4jax.checkpoint.safetensors import Index, TensorSpec

# Name -> the file that holds the tensor, for errors; the folder if no file does.
Locate = Callable[[str], str]
WORD_VALUES = 8  # int4 values in a 32-bit word
_PACKED_ZEROS = np.uint32(0x88888888).view(np.int32)  # eight int4 zeros in a word
NVFP4_GROUP_SIZE = 16
_FP4_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])  # by nibble, the sign on top


@dataclasses.dataclass(frozen=True)
class QuantizedRecipe:
    """A parameter as data and scales, a recipe each.

    Attributes:
        data: of float8_e4m3fn values; or of int4 values in words of `WORD_VALUES`.
        scale: one per output channel, [out..] (fp8); or one per group, [out.., in / group_size].
        is_packed: whether the data are words of int4.
    """

    data: Recipe
    scale: Recipe
    is_packed: bool

    @property
    def format(self) -> str:
        return "int4" if self.is_packed else "fp8"

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.data.sources + self.scale.sources


@dataclasses.dataclass(frozen=True)
class Nvfp4Recipe:
    """A parameter stored as nvfp4, which is dequantized on the host to the model's dtype.

    A value is e2m1 data, times `scale` of its group of 16, times or divided by `global_scale` of
    its stored tensor.

    Attributes:
        data: of bytes, two values each, the low nibble first.
        scale: of float8_e4m3fn, one per group.
        global_scale: float32, one per stored tensor, in the shape of `scale`.
        is_multiplier: whether `global_scale` multiplies (ModelOpt) or divides (compressed-tensors).
        in_axis: the files' axis of inputs, along which values share bytes and groups. The last,
            except for fused experts.
    """

    data: Recipe
    scale: Recipe
    global_scale: Recipe
    is_multiplier: bool
    in_axis: int

    @property
    def format(self) -> str:
        return "nvfp4"

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.data.sources + self.scale.sources + self.global_scale.sources


def resolve_format(
    path: str, recipe: Recipe, stored: Mapping[str, TensorSpec], locate: Locate
) -> Recipe | QuantizedRecipe | Nvfp4Recipe:
    """Make the recipe for a parameter's stored format from the recipe of the unquantized weight.

    Args:
        path: of the parameter.
        recipe: of the unquantized weight.
        stored: name -> (dtype, shape) of every tensor.
        locate: gives the file of a tensor, for errors.

    Raises:
        CheckpointError: tensors in different formats, a missing scale, or one of a wrong shape.
    """
    formats = {_detect_format(source.name, stored) for source in recipe.sources}
    if len(formats) > 1:
        raise CheckpointError(
            f"{locate('')}: the tensors of {path} ({recipe.sources[0].name}, ..) are quantized in "
            f"different formats: {', '.join(sorted(formats))}."
        )
    format = formats.pop()
    if format == "unquantized":
        return recipe
    is_fused = recipe.permutation is not None
    if is_fused and format == "fp8":
        return QuantizedRecipe(recipe, _make_tensor_scale(recipe, stored, locate), is_packed=False)
    if format == "modelopt nvfp4":
        joint = "_weight" if is_fused else ""
        return _make_nvfp4(recipe, stored, locate, ("", f"{joint}_scale", f"{joint}_scale_2"))
    name = recipe.sources[0].name
    if is_fused:
        raise CheckpointError(
            f"{locate(name)}: {name} is {format} and holds all experts in one tensor: "
            "experts have to be stored one by one."
        )
    in_axes = _count_in_axes(recipe)
    if format == "fp8":
        scale = _make_channel_scales(recipe, stored, locate, in_axes)
        return QuantizedRecipe(recipe, scale, is_packed=False)
    if format == "nvfp4":
        return _make_nvfp4(recipe, stored, locate, ("_packed", "_scale", "_global_scale"))
    if in_axes != 1 or recipe.shape[-1] % WORD_VALUES:
        raise CheckpointError(
            f"{locate(name)}: {name} cannot be {format}: {path} has other columns."
        )
    groups = {_count_groups(source, stored, locate) for source in recipe.sources}
    if len(groups) > 1:
        raise CheckpointError(
            f"{locate('')}: the tensors of {path} have groups of different sizes."
        )
    data, scale = (
        _pack_recipe(recipe, suffix, factor)
        for suffix, factor in (
            ("_packed", WORD_VALUES),
            ("_scale", recipe.shape[-1] // groups.pop()),
        )
    )
    return QuantizedRecipe(data, scale, is_packed=True)


def make_scale_view(index: Index, recipe: Recipe) -> Callable[[str], np.ndarray]:
    """Make a view of stored scales that broadcasts per-tensor scales to all channels."""
    shapes = {source.name: source.stored_shape for source in recipe.sources}

    def view(name: str) -> np.ndarray:
        scale = index.view(name)
        return np.broadcast_to(scale.reshape(-1), shapes[name]) if scale.size == 1 else scale

    return view


def unpack_int4(words: np.ndarray) -> np.ndarray:
    """Unpack int32 words to int4 values, 8 per word on the last axis: low nibble first, minus 8."""
    shifts = 4 * np.arange(WORD_VALUES, dtype=np.int32)
    nibbles = words.astype(np.int32, copy=False)[..., None] >> shifts
    values = (nibbles & 15).astype(np.int8) - 8
    return values.reshape(*words.shape[:-1], -1).astype(ml_dtypes.int4)


def check_int4_metadata(index: Index, names: list[str]) -> None:
    """Refuse int4 tensors that contradict their `weight_shape` or reorder groups (`weight_g_idx`).

    Args:
        names: of the packed tensors.
    """
    for packed in names:
        base = packed.removesuffix("_packed")
        rows, words = index.specs[packed][1]
        if base + "_shape" in index.specs:
            shape = index.view(base + "_shape").tolist()
            if shape != [rows, words * WORD_VALUES]:
                raise CheckpointError(
                    f"{index.tensors[base + '_shape'].path}: {base}_shape says {shape}, and "
                    f"{packed} holds {[rows, words * WORD_VALUES]}."
                )
        if base + "_g_idx" in index.specs:
            group_of = index.view(base + "_g_idx")
            groups = index.specs[base + "_scale"][1][-1]
            columns = len(group_of)
            if not np.array_equal(group_of, np.arange(columns) // (columns // groups)):
                raise CheckpointError(
                    f"{index.tensors[base + '_g_idx'].path}: {base}_g_idx puts columns into groups "
                    "out of order, which is not supported: quantize without activation ordering "
                    "(actorder)."
                )


def check_unused_tensors(index: Index, weights: Iterable[str]) -> None:
    """Refuse tensors beside int4 and fp8 weights that change their values and are not read.

    A zero point of zero and a global scale of one change nothing.

    Args:
        weights: names of the stored data; fused experts have no `weight` in theirs.
    """
    for data in weights:
        weight = data.removesuffix("_packed")
        weight = weight if weight.endswith("weight") else f"{weight}_weight"
        for suffix, wanted, cause in (
            ("zero_point", 0, "asymmetric quantization"),
            ("global_scale", 1, "a scale of scales"),
            ("scale_2", 1, "a scale of scales"),
        ):
            name = f"{weight}_{suffix}"
            if name not in index.specs:
                continue
            values = index.view(name)
            # Packed int4 stores a zero point of zero as the nibble 8.
            is_packed = suffix == "zero_point" and index.specs[name][0] == "I32"
            if not (values == (_PACKED_ZEROS if is_packed else wanted)).all():
                raise CheckpointError(
                    f"{index.tensors[name].path}: {name} is {cause}, which is not supported for "
                    "this format: quantize symmetrically (symmetric: true), or take the BF16 "
                    "checkpoint with --quantization int4."
                )


def dequantize_nvfp4(
    packed: np.ndarray,
    scale: np.ndarray,
    global_scale: np.ndarray,
    *,
    is_multiplier: bool,
    in_axis: int,
) -> np.ndarray:
    """Dequantize bytes of two e2m1 values each to float32; arguments as in `Nvfp4Recipe`."""
    packed, scale, global_scale = (
        np.moveaxis(array, in_axis, -1) for array in (packed, scale, global_scale)
    )
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1)
    nibbles = nibbles.reshape(*scale.shape, NVFP4_GROUP_SIZE)
    factor = scale.astype(np.float32)
    factor = factor * global_scale if is_multiplier else factor / global_scale
    values = (_FP4_VALUES[nibbles] * factor[..., None]).reshape(*packed.shape[:-1], -1)
    return np.moveaxis(values, -1, in_axis)


def _make_nvfp4(
    recipe: Recipe,
    stored: Mapping[str, TensorSpec],
    locate: Locate,
    suffixes: tuple[str, str, str],
) -> Nvfp4Recipe:
    """Make the recipe of an nvfp4 parameter.

    Args:
        suffixes: of the names of data, scale and global scale, after the unquantized weight's name.
    """
    in_axis, name = recipe.file_axes[-1], recipe.sources[0].name
    if recipe.shape[in_axis] % NVFP4_GROUP_SIZE:
        raise CheckpointError(
            f"{locate(name)}: {name} is nvfp4, and its {recipe.shape[in_axis]} columns are not "
            f"groups of {NVFP4_GROUP_SIZE}."
        )
    data, scale, global_scale = (
        _pack_recipe(recipe, suffix, factor, in_axis)
        for suffix, factor in zip(suffixes, (2, NVFP4_GROUP_SIZE, NVFP4_GROUP_SIZE), strict=True)
    )
    for source in (*data.sources, *scale.sources):
        if source.name not in stored or stored[source.name][1] != source.stored_shape:
            found = list(stored[source.name][1]) if source.name in stored else "nothing"
            raise CheckpointError(
                f"{locate(source.name)} has {source.name} {found} instead of "
                f"{[*source.stored_shape]}."
            )
    for source in global_scale.sources:
        if source.name not in stored or math.prod(stored[source.name][1]) != 1:
            found = list(stored[source.name][1]) if source.name in stored else "nothing"
            raise CheckpointError(
                f"{locate(source.name)} has {source.name} {found} instead of one number."
            )
    is_multiplier = suffixes[2].endswith("_scale_2")
    return Nvfp4Recipe(data, scale, global_scale, is_multiplier, in_axis)


def _make_tensor_scale(recipe: Recipe, stored: Mapping[str, TensorSpec], locate: Locate) -> Recipe:
    """Make the recipe of fused experts' per-tensor scale, broadcast to all output channels."""
    (source,) = recipe.sources
    name, shape = source.name + "_weight_scale", recipe.parameter_shape[:-1]
    if name not in stored or math.prod(stored[name][1]) != 1:
        raise CheckpointError(f"{locate(name)} lacks {name}, one number: {source.name} is fp8.")
    return Recipe((Source(name, (math.prod(shape),), (0,) * len(shape), shape),), shape)


def _detect_format(name: str, stored: Mapping[str, TensorSpec]) -> str:
    if name + "_packed" in stored:
        return "nvfp4" if stored[name + "_packed"][0] == "U8" else "int4"
    dtype = stored[name][0]
    if dtype == "U8":
        return "modelopt nvfp4"
    return "fp8" if dtype == "F8_E4M3" else "unquantized"


def _count_in_axes(recipe: Recipe) -> int:
    """Count the parameter's last axes that are the stored matrices' `in`."""
    source = recipe.sources[0]
    return next(n for n in range(1, 9) if math.prod(source.shape[-n:]) == source.stored_shape[-1])


def _make_channel_scales(
    recipe: Recipe, stored: Mapping[str, TensorSpec], locate: Locate, in_axes: int
) -> Recipe:
    """Make the recipe of scales per output channel: the weight's without its `in` axes."""
    sources = []
    for source in recipe.sources:
        name, expected = source.name + "_scale", source.stored_shape[:1]
        if name not in stored:
            raise CheckpointError(
                f"{locate(name)} lacks {name}: {source.name} means nothing without it."
            )
        shape = stored[name][1]
        if math.prod(shape) not in (1, math.prod(expected)):
            raise CheckpointError(
                f"{locate(name)} has {name} {list(shape)} instead of {[*expected, 1]}."
            )
        sources.append(Source(name, expected, source.start[:-in_axes], source.shape[:-in_axes]))
    return Recipe(tuple(sources), recipe.shape[:-in_axes])


def _count_groups(source: Source, stored: Mapping[str, TensorSpec], locate: Locate) -> int:
    packed, name = source.name + "_packed", source.name + "_scale"
    rows, columns = source.stored_shape
    expected = (rows, columns // WORD_VALUES)
    if stored[packed] != ("I32", expected):
        raise CheckpointError(
            f"{locate(packed)} has {packed} {stored[packed]} instead of I32 {list(expected)}."
        )
    if name not in stored:
        raise CheckpointError(f"{locate(name)} lacks {name}: {packed} means nothing without it.")
    shape = stored[name][1]
    if len(shape) != 2 or shape[0] != rows or not shape[1] or columns % shape[1]:
        raise CheckpointError(
            f"{locate(name)} has {name} {list(shape)}, which fits no groups of {[rows, columns]}."
        )
    return shape[1]


def _pack_recipe(recipe: Recipe, suffix: str, factor: int, axis: int = -1) -> Recipe:
    """Make the recipe of tensors with a name suffix that hold `factor` values in one element.

    Args:
        axis: the files' axis along which values share an element.
    """
    axis %= len(recipe.shape)

    def shrink(shape: tuple[int, ...], at: int) -> tuple[int, ...]:
        return (*shape[:at], shape[at] // factor, *shape[at + 1 :])

    sources = (
        Source(
            source.name + suffix,
            shrink(source.stored_shape, 1),  # of [out, in], and of fused experts [E, in, out]
            source.start,
            shrink(source.shape, axis),
        )
        for source in recipe.sources
    )
    return Recipe(tuple(sources), shrink(recipe.shape, axis), recipe.permutation)
