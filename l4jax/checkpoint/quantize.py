"""Quantized weights on disk: which stored tensors make up the data and the scales of a parameter.

What a tensor is quantized as is read off the tensors themselves: an fp8 weight has an fp8 dtype and
a `weight_scale`, an int4 one is `weight_packed` in words of 32 bits, an nvfp4 one in bytes, or, by
ModelOpt, bytes beside a `weight_scale_2`. Which layers are is not asked. Scales of activations
(`input_scale`) are not needed: ours are found token by token.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.recipe import Part, Recipe
from l4jax.checkpoint.safetensors import Index, Kind

# The file that holds a tensor of this name, for errors; the folder, where none does.
Locate = Callable[[str], str]
WORD = 8  # values of 4 bits in a word of 32
FP4_GROUP = 16  # neighbors that share a scale in nvfp4
# e2m1: a sign, then 0, 1/2, 1, 3/2, 2, 3, 4, 6.
_FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4_VALUES, -_FP4_VALUES])


@dataclasses.dataclass(frozen=True)
class QuantizedRecipe:
    """A parameter as data and scales, each put together like a plain one.

    Attributes:
        data: of float8_e4m3fn values; or of the words that hold int4 values, `WORD` each.
        scale: one for each output channel, [out..]; or for each group, [out.., in / group].
        is_packed: whether the data are words of int4.
    """

    data: Recipe
    scale: Recipe
    is_packed: bool

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.data.parts + self.scale.parts


@dataclasses.dataclass(frozen=True)
class Nvfp4Recipe:
    """A parameter that is computed in the model's dtype and stored in 4 bits: e2m1 values, times
    `scale` for each 16 neighbors, with `whole` for one number a stored tensor.

    Attributes:
        data: of bytes, two values each, the low nibble first.
        scale: of float8_e4m3fn, one for 16 values.
        whole: float32, as if it were stored for each scale.
        multiplies: whether `whole` is a factor, as ModelOpt has it, and not a divisor.
        axis: of the file's axes, the one that a product sums over: values that share a byte or a
            scale are neighbors on it. The last, but for fused experts.
    """

    data: Recipe
    scale: Recipe
    whole: Recipe
    multiplies: bool
    axis: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.data.parts + self.scale.parts + self.whole.parts


def resolve(
    path: str, recipe: Recipe, stored: Mapping[str, Kind], where: Locate
) -> Recipe | QuantizedRecipe | Nvfp4Recipe:
    """The recipe for what is stored of a parameter, given the one for the plain weight.

    Raises:
        CheckpointError: for parts in different formats, a missing scale, or one of a wrong shape.
    """
    forms = {_find_form(part.name, stored) for part in recipe.parts}
    if len(forms) > 1:
        raise CheckpointError(
            f"{where('')}: the tensors of {path} ({recipe.parts[0].name}, ..) are quantized in "
            f"different ways: {', '.join(sorted(forms))}."
        )
    form = forms.pop()
    if form == "plain":
        return recipe
    if recipe.order is not None and form == "fp8":
        return QuantizedRecipe(recipe, _share_scale(recipe, stored, where), is_packed=False)
    if form == "modelopt nvfp4":
        joint = "_weight" if recipe.order is not None else ""
        return _resolve_nvfp4(recipe, stored, where, ("", f"{joint}_scale", f"{joint}_scale_2"))
    name = recipe.parts[0].name
    if recipe.order is not None:
        raise CheckpointError(
            f"{where(name)}: {name} is {form} and holds all experts in one tensor: "
            "experts have to be stored one by one."
        )
    inner = _count_inner(recipe)
    if form == "fp8":
        scale = _find_channel_scales(recipe, stored, where, inner)
        return QuantizedRecipe(recipe, scale, is_packed=False)
    if form == "nvfp4":
        return _resolve_nvfp4(recipe, stored, where, ("_packed", "_scale", "_global_scale"))
    if inner != 1 or recipe.shape[-1] % WORD:
        raise CheckpointError(f"{where(name)}: {name} cannot be {form}: {path} has other columns.")
    groups = {_count_groups(part, stored, where) for part in recipe.parts}
    if len(groups) > 1:
        raise CheckpointError(f"{where('')}: the tensors of {path} have groups of different sizes.")
    data, scale = (
        _narrow(recipe, suffix, values)
        for suffix, values in (("_packed", WORD), ("_scale", recipe.shape[-1] // groups.pop()))
    )
    return QuantizedRecipe(data, scale, is_packed=True)


def make_scale_view(index: Index, recipe: Recipe) -> Callable[[str], np.ndarray]:
    """A view of stored scales, one number for a whole matrix spread over its channels."""
    shapes = {part.name: part.stored for part in recipe.parts}

    def view(name: str) -> np.ndarray:
        found = index.view(name)
        return np.broadcast_to(found.reshape(-1), shapes[name]) if found.size == 1 else found

    return view


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 words to int4 values, eight for each on the last axis: low nibble first, less 8."""
    nibbles = words.astype(np.int32, copy=False)[..., None] >> (4 * np.arange(WORD, dtype=np.int32))
    values = (nibbles & 15).astype(np.int8) - 8
    return values.reshape(*words.shape[:-1], -1).astype(ml_dtypes.int4)


def check_beside(index: Index, names: list[str]) -> None:
    """Refuse int4 tensors whose `weight_shape` or `weight_g_idx` says something else than we read.

    Args:
        names: of the packed tensors.
    """
    for packed in names:
        base = packed.removesuffix("_packed")
        rows, words = index.kinds[packed][1]
        if base + "_shape" in index.kinds:
            shape = index.view(base + "_shape").tolist()
            if shape != [rows, words * WORD]:
                raise CheckpointError(
                    f"{index.tensors[base + '_shape'].path}: {base}_shape says {shape}, and "
                    f"{packed} holds {[rows, words * WORD]}."
                )
        if base + "_g_idx" in index.kinds:
            order = index.view(base + "_g_idx")
            groups = index.kinds[base + "_scale"][1][-1]
            if not np.array_equal(order, np.arange(len(order)) // (len(order) // groups)):
                raise CheckpointError(
                    f"{index.tensors[base + '_g_idx'].path}: {base}_g_idx puts columns into groups "
                    "out of order, which is not supported: quantize without activation ordering "
                    "(actorder)."
                )


def decode_nvfp4(
    packed: np.ndarray, scale: np.ndarray, whole: np.ndarray, *, multiplies: bool, axis: int
) -> np.ndarray:
    """float32 values of bytes, two each along an axis, with their scales: see `Nvfp4Recipe`."""
    packed, scale, whole = (np.moveaxis(part, axis, -1) for part in (packed, scale, whole))
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scale.shape, FP4_GROUP)
    factor = scale.astype(np.float32)
    factor = factor * whole if multiplies else factor / whole
    values = (_FP4_VALUES[nibbles] * factor[..., None]).reshape(*packed.shape[:-1], -1)
    return np.moveaxis(values, -1, axis)


def _resolve_nvfp4(
    recipe: Recipe, stored: Mapping[str, Kind], where: Locate, suffixes: tuple[str, str, str]
) -> Nvfp4Recipe:
    """Args: suffixes: of the names of data, scale and whole, behind that of the plain weight."""
    axis, name = recipe.turn[-1], recipe.parts[0].name
    if recipe.shape[axis] % FP4_GROUP:
        raise CheckpointError(
            f"{where(name)}: {name} is nvfp4, and its {recipe.shape[axis]} columns are not groups "
            f"of {FP4_GROUP}."
        )
    data, scale, whole = (
        _narrow(recipe, suffix, values, axis)
        for suffix, values in zip(suffixes, (2, FP4_GROUP, FP4_GROUP), strict=True)
    )
    for part in (*data.parts, *scale.parts):
        if part.name not in stored or stored[part.name][1] != part.stored:
            found = list(stored[part.name][1]) if part.name in stored else "nothing"
            raise CheckpointError(
                f"{where(part.name)} has {part.name} {found} instead of {[*part.stored]}."
            )
    for part in whole.parts:
        if part.name not in stored or math.prod(stored[part.name][1]) != 1:
            found = list(stored[part.name][1]) if part.name in stored else "nothing"
            raise CheckpointError(
                f"{where(part.name)} has {part.name} {found} instead of one number."
            )
    return Nvfp4Recipe(data, scale, whole, suffixes[2].endswith("_scale_2"), axis)


def _share_scale(recipe: Recipe, stored: Mapping[str, Kind], where: Locate) -> Recipe:
    """The one scale of fused experts, as if there were one for each output channel."""
    (part,) = recipe.parts
    name, shape = part.name + "_weight_scale", recipe.parameter_shape[:-1]
    if name not in stored or math.prod(stored[name][1]) != 1:
        raise CheckpointError(f"{where(name)} lacks {name}, one number: {part.name} is fp8.")
    return Recipe((Part(name, (math.prod(shape),), (0,) * len(shape), shape),), shape)


def _find_form(name: str, stored: Mapping[str, Kind]) -> str:
    if name + "_packed" in stored:
        return "nvfp4" if stored[name + "_packed"][0] == "U8" else "int4"
    dtype = stored[name][0]
    if dtype == "U8":
        return "modelopt nvfp4"
    return "fp8" if dtype == "F8_E4M3" else "plain"


def _count_inner(recipe: Recipe) -> int:
    """How many of a parameter's last axes are the `in` of the matrices that it is stored as."""
    part = recipe.parts[0]
    return next(n for n in range(1, 9) if math.prod(part.shape[-n:]) == part.stored[-1])


def _find_channel_scales(
    recipe: Recipe, stored: Mapping[str, Kind], where: Locate, inner: int
) -> Recipe:
    """The recipe without its last axes, of the scales of its tensors' output channels."""
    parts = []
    for part in recipe.parts:
        name, wanted = part.name + "_scale", part.stored[:1]
        if name not in stored:
            raise CheckpointError(
                f"{where(name)} lacks {name}: {part.name} means nothing without it."
            )
        shape = stored[name][1]
        if math.prod(shape) not in (1, math.prod(wanted)):
            raise CheckpointError(
                f"{where(name)} has {name} {list(shape)} instead of {[*wanted, 1]}."
            )
        parts.append(Part(name, wanted, part.start[:-inner], part.shape[:-inner]))
    return Recipe(tuple(parts), recipe.shape[:-inner])


def _count_groups(part: Part, stored: Mapping[str, Kind], where: Locate) -> int:
    packed, name = part.name + "_packed", part.name + "_scale"
    wanted = (part.stored[0], part.stored[1] // WORD)
    if stored[packed] != ("I32", wanted):
        raise CheckpointError(
            f"{where(packed)} has {packed} {stored[packed]} instead of I32 {list(wanted)}."
        )
    if name not in stored:
        raise CheckpointError(f"{where(name)} lacks {name}: {packed} means nothing without it.")
    shape = stored[name][1]
    if len(shape) != 2 or shape[0] != part.stored[0] or not shape[1] or part.stored[1] % shape[1]:
        raise CheckpointError(
            f"{where(name)} has {name} {list(shape)}, which fits no groups of {list(part.stored)}."
        )
    return shape[1]


def _narrow(recipe: Recipe, suffix: str, values: int, axis: int = -1) -> Recipe:
    """The recipe of tensors named alike but for a suffix, each of which holds so many values along
    an axis in one."""
    axis %= len(recipe.shape)

    def shrink(shape: tuple[int, ...], at: int) -> tuple[int, ...]:
        return (*shape[:at], shape[at] // values, *shape[at + 1 :])

    parts = (
        Part(
            part.name + suffix,
            # Fused experts have it in the middle of the file, too.
            shrink(part.stored, 1),
            part.start,
            shrink(part.shape, axis),
        )
        for part in recipe.parts
    )
    return Recipe(tuple(parts), shrink(recipe.shape, axis), recipe.order)
