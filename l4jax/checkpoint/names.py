"""Hugging Face's tensor names: one table with the stored tensors that make up each parameter.

In names, `*` is the layer and `#` the expert.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from l4jax.checkpoint.errors import CheckpointError, list_few
from l4jax.checkpoint.layouts import (
    Shape,
    join_heads,
    reshape_tensor,
    stack_biases,
    stack_matrices,
    stack_unfused_experts,
    transpose_fused_experts,
)
from l4jax.checkpoint.quantized_reader import (
    Locate,
    Nvfp4Recipe,
    QuantizedRecipe,
    resolve_format,
)
from l4jax.checkpoint.recipe import Recipe
from l4jax.checkpoint.safetensors import TensorSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of a parameter of a certain rank in checkpoints.

    Attributes:
        rank: of the parameter: gate and up are stacked, experts have an axis of their own.
        make_recipe: takes the parameter's shape and the names of the stored tensors.
        names: of the stored tensors.
    """

    rank: int
    make_recipe: Callable[..., Recipe]
    names: tuple[str, ...]


_LAYER = "model.layers.*."
_FEED, _ATTEND = _LAYER + "feed_forward.", _LAYER + "self_attn."
_SHARED, _EXPERT = _FEED + "shared_expert.", _FEED + "experts.#."
_VISION_LAYER = "vision_model.model.layers.*."
_VISION_ATTEND = _VISION_LAYER + "self_attn."


def _list(rank: int, make_recipe: Callable[..., Recipe], *names: str) -> list[Layout]:
    return [Layout(rank, make_recipe, names)]


TABLE: Mapping[str, list[Layout]] = {
    "text/embedding": _list(2, reshape_tensor, "model.embed_tokens.weight"),
    "text/head": _list(2, reshape_tensor, "lm_head.weight"),
    "text/norm/scale": _list(1, reshape_tensor, "model.norm.weight"),
    "text/layer_*/attention_norm/scale": _list(
        1, reshape_tensor, _LAYER + "input_layernorm.weight"
    ),
    "text/layer_*/feed_forward_norm/scale": _list(
        1, reshape_tensor, _LAYER + "post_attention_layernorm.weight"
    ),
    "text/layer_*/attention/qkv": _list(
        4, join_heads, *(f"{_ATTEND}{x}_proj.weight" for x in ("q", "k", "v"))
    ),
    "text/layer_*/attention/out": _list(4, reshape_tensor, _ATTEND + "o_proj.weight"),
    "text/layer_*/feed_forward/router": _list(2, reshape_tensor, _FEED + "router.weight"),
    "text/layer_*/feed_forward/gate_up": [
        *_list(3, stack_matrices, _FEED + "gate_proj.weight", _FEED + "up_proj.weight"),
        *_list(4, transpose_fused_experts, _FEED + "experts.gate_up_proj"),
        *_list(4, stack_unfused_experts, _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    ],
    "text/layer_*/feed_forward/down": [
        *_list(2, reshape_tensor, _FEED + "down_proj.weight"),
        *_list(3, transpose_fused_experts, _FEED + "experts.down_proj"),
        *_list(3, stack_unfused_experts, _EXPERT + "down_proj.weight"),
    ],
    "text/layer_*/feed_forward/shared/gate_up": _list(
        3, stack_matrices, _SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"
    ),
    "text/layer_*/feed_forward/shared/down": _list(2, reshape_tensor, _SHARED + "down_proj.weight"),
    "vision/patch": _list(2, reshape_tensor, "vision_model.patch_embedding.linear.weight"),
    "vision/class_embedding": _list(1, reshape_tensor, "vision_model.class_embedding"),
    "vision/position_embedding": _list(2, reshape_tensor, "vision_model.positional_embedding_vlm"),
    "vision/norm_before/scale": _list(1, reshape_tensor, "vision_model.layernorm_pre.weight"),
    "vision/norm_before/bias": _list(1, reshape_tensor, "vision_model.layernorm_pre.bias"),
    "vision/norm_after/scale": _list(1, reshape_tensor, "vision_model.layernorm_post.weight"),
    "vision/norm_after/bias": _list(1, reshape_tensor, "vision_model.layernorm_post.bias"),
    "vision/layer_*/attention_norm/scale": _list(
        1, reshape_tensor, _VISION_LAYER + "input_layernorm.weight"
    ),
    "vision/layer_*/attention_norm/bias": _list(
        1, reshape_tensor, _VISION_LAYER + "input_layernorm.bias"
    ),
    "vision/layer_*/mlp_norm/scale": _list(
        1, reshape_tensor, _VISION_LAYER + "post_attention_layernorm.weight"
    ),
    "vision/layer_*/mlp_norm/bias": _list(
        1, reshape_tensor, _VISION_LAYER + "post_attention_layernorm.bias"
    ),
    "vision/layer_*/qkv": _list(
        4, stack_matrices, *(f"{_VISION_ATTEND}{x}_proj.weight" for x in ("q", "k", "v"))
    ),
    "vision/layer_*/qkv_bias": _list(
        3, stack_biases, *(f"{_VISION_ATTEND}{x}_proj.bias" for x in ("q", "k", "v"))
    ),
    "vision/layer_*/out": _list(3, reshape_tensor, _VISION_ATTEND + "o_proj.weight"),
    "vision/layer_*/out_bias": _list(1, reshape_tensor, _VISION_ATTEND + "o_proj.bias"),
    "vision/layer_*/up": _list(2, reshape_tensor, _VISION_LAYER + "mlp.fc1.weight"),
    "vision/layer_*/up_bias": _list(1, reshape_tensor, _VISION_LAYER + "mlp.fc1.bias"),
    "vision/layer_*/down": _list(2, reshape_tensor, _VISION_LAYER + "mlp.fc2.weight"),
    "vision/layer_*/down_bias": _list(1, reshape_tensor, _VISION_LAYER + "mlp.fc2.bias"),
    "vision/adapter/first": _list(2, reshape_tensor, "vision_model.vision_adapter.mlp.fc1.weight"),
    "vision/adapter/second": _list(2, reshape_tensor, "vision_model.vision_adapter.mlp.fc2.weight"),
    "vision/projector": _list(2, reshape_tensor, "multi_modal_projector.linear_1.weight"),
}

# Matrices, and how many of their last axes are inputs, which a product sums over.
IN_AXES: Mapping[str, int] = {
    "text/head": 1,
    "text/layer_*/attention/qkv": 1,
    "text/layer_*/attention/out": 3,
    "text/layer_*/feed_forward/router": 1,
    "text/layer_*/feed_forward/gate_up": 1,
    "text/layer_*/feed_forward/down": 1,
    "text/layer_*/feed_forward/shared/gate_up": 1,
    "text/layer_*/feed_forward/shared/down": 1,
    "vision/patch": 1,
    "vision/layer_*/qkv": 1,
    "vision/layer_*/out": 2,
    "vision/layer_*/up": 1,
    "vision/layer_*/down": 1,
    "vision/adapter/first": 1,
    "vision/adapter/second": 1,
    "vision/projector": 1,
}
# Parameters of a module of fused experts, in the module's order.
FUSED_EXPERTS = ("gate_up_proj", "down_proj")
# The names that PEFT may store with an adapter, in a text-only checkpoint.
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")

# A model with a vision tower has this before the decoder's names; a text-only one does not.
_PREFIX = "language_model."
# RoPE frequencies, which some tools save: l4jax computes them from the config.
_ROPE_BUFFERS = re.compile(r".*rotary_emb(edding)?\.(inv_freq|original_inv_freq|freqs_ci)")
# Calibrated scales of an fp8 KV cache: one each of keys and values per layer.
_KV_SCALE = re.compile(
    r"(language_model\.)?model\.layers\.(\d+)\.self_attn\.([kv]_proj\.)?([kv])_scale"
)
# Tensors that quantizers write in addition to a weight, or instead of it (`weight_packed`).
_QUANTIZATION_TENSOR = re.compile(
    r"(?P<base>.*)(?P<joint>[._])(?P<suffix>weight_(packed|shape|scale|scale_2|g_idx|zero_point|global_scale)"
    r"|(input|output)_(scale|zero_point|global_scale)|[kv]_scale)"
)
# Results of `detect_quantization` that can be loaded.
LOADABLE_FORMATS = (
    "compressed-tensors float-quantized fp8",
    "compressed-tensors pack-quantized int4",
    "compressed-tensors nvfp4-pack-quantized",
    "modelopt fp8",
    "modelopt nvfp4",
)
# Matrices that publishers quantize: routed experts; shared experts and dense layers in addition;
# attention in addition.
ROUTED_EXPERTS = re.compile(r".*\.feed_forward\.experts\..*")
FEED_FORWARD = re.compile(r".*\.feed_forward\.(?!router).*")
TEXT_LINEAR = re.compile(r"(?!vision_model\.).*\.(self_attn|feed_forward)\.(?!router).*")
KEY_OR_VALUE = re.compile(r".*\.self_attn\.([kv])_proj")
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class NameMatch:
    """Parameters matched with stored tensors by name alone.

    Attributes:
        recipes: path -> recipe of the unquantized weight, of every parameter.
        unknown: stored names that belong to no parameter.
        missing: names that a recipe needs and that are not stored.
    """

    recipes: Mapping[str, Recipe]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]


def match_names(shapes: Mapping[str, Shape], stored: Iterable[str]) -> NameMatch:
    """Match parameters (path -> shape) with stored names, quantized or not."""
    ignored = (_ROPE_BUFFERS, _KV_SCALE)
    left = {name for name in stored if not any(pattern.fullmatch(name) for pattern in ignored)}
    weights = set(left)
    quantization_tensors: dict[str, list[str]] = {}  # by the weight that they belong to
    for name in left:
        if found := _QUANTIZATION_TENSOR.fullmatch(name):
            weights.discard(name)
            weight = found["base"] + (".weight" if found["joint"] == "." else "")
            quantization_tensors.setdefault(weight, []).append(name)
            if found["suffix"] == "weight_packed":
                weights.add(weight)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in left) else ""
    recipes = {path: _choose_recipe(path, shape, prefix, weights) for path, shape in shapes.items()}
    wanted = {source.name for recipe in recipes.values() for source in recipe.sources}
    unknown = weights - wanted
    for weight, names in quantization_tensors.items():
        if weight not in wanted:
            unknown.discard(weight)
            unknown.update(names)
    return NameMatch(recipes, tuple(sorted(unknown)), tuple(sorted(wanted - weights)))


def match_tensors(
    shapes: Mapping[str, Shape],
    stored: Mapping[str, TensorSpec],
    origin: str,
    files: Mapping[str, str] | None = None,
) -> dict[str, Recipe | QuantizedRecipe | Nvfp4Recipe]:
    """Make the recipe of every parameter, with each stored tensor used once and of its shape.

    Args:
        shapes: path -> shape of every parameter, as in "text/layer_3/attention/qkv".
        stored: name -> (dtype, shape) of every tensor.
        origin: the folder, for errors.
        files: name -> the file that holds it, for errors about one tensor.

    Raises:
        CheckpointError: naming the tensors that are unknown, missing, or of another shape.
    """
    if (found := detect_quantization(stored)) and found not in LOADABLE_FORMATS:
        raise CheckpointError(
            f"{origin} is quantized ({found}), which is not supported yet: "
            f"take one in BF16, or one of these: {', '.join(LOADABLE_FORMATS)}."
        )

    def locate(name: str) -> str:
        return (files or {}).get(name, origin)

    matched = match_names(shapes, stored)
    lists = {"lacks": matched.missing, "has unknown": matched.unknown}
    if problems := [f"{how} {list_few(names)}" for how, names in lists.items() if names]:
        raise CheckpointError(
            f"{origin} {' and '.join(problems)}: "
            "its tensors are not those of the model in its config.json."
        )
    recipes = {
        path: resolve_format(path, recipe, stored, locate)
        for path, recipe in matched.recipes.items()
    }
    unquantized = [recipe for recipe in recipes.values() if isinstance(recipe, Recipe)]
    fp8 = [
        recipe.data
        for recipe in recipes.values()
        if isinstance(recipe, QuantizedRecipe) and not recipe.is_packed
    ]
    _check_shapes([*unquantized, *fp8], stored, locate)
    _check_dtypes(unquantized, stored, locate)
    return recipes


def _check_shapes(
    recipes: Iterable[Recipe], stored: Mapping[str, TensorSpec], locate: Locate
) -> None:
    wrong = [
        (name, f"{name} {list(stored[name][1])} instead of {list(shape)}")
        for recipe in recipes
        for name, shape in ((source.name, source.stored_shape) for source in recipe.sources)
        if tuple(stored[name][1]) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{locate(wrong[0][0])} has {list_few([text for _, text in wrong])}: "
            "its config.json belongs to another model."
        )


def _check_dtypes(
    recipes: Iterable[Recipe], stored: Mapping[str, TensorSpec], locate: Locate
) -> None:
    wrong = [
        (name, f"{name} ({stored[name][0]})")
        for recipe in recipes
        for name in (source.name for source in recipe.sources)
        if stored[name][0] not in _FLOATS
    ]
    if wrong:
        raise CheckpointError(
            f"{locate(wrong[0][0])} has {list_few([text for _, text in wrong])}: "
            f"weights must be {', '.join(_FLOATS)}."
        )


def export_parameter(path: str, value: np.ndarray, *, has_vision: bool) -> dict[str, np.ndarray]:
    """Split a parameter into the tensors of the published BF16 layout: the inverse of loading.

    Args:
        path: of the parameter, as in "text/layer_3/attention/qkv".
        value: of the parameter.
        has_vision: whether the checkpoint has the vision tower, which changes the names.
    """
    recipe = make_published_recipe(path, value.shape, has_vision=has_vision)
    value = value.transpose(np.argsort(recipe.file_axes))
    boxes = {
        source.name: value[tuple(map(slice, source.start, np.add(source.start, source.shape)))]
        for source in recipe.sources
    }
    return {
        source.name: boxes[source.name].reshape(source.stored_shape) for source in recipe.sources
    }


def make_published_recipe(path: str, shape: Shape, *, has_vision: bool) -> Recipe:
    """Make a parameter's recipe in the published BF16 layout.

    `has_vision` is as in `export_parameter`.
    """
    return _choose_recipe(path, shape, _PREFIX if has_vision else "", set())


def strip_prefix(name: str) -> str:
    """Strip a name, or the beginning of one, to its form in a text-only checkpoint."""
    return name.removeprefix(_PREFIX)


def count_in_axes(path: str) -> int | None:
    """Count a matrix's last axes that a product sums over; None for other parameters.

    The embedding counts as no matrix: its rows are looked up.
    """
    return IN_AXES.get(_generalize(path))


def map_kv_scales(stored: Iterable[str]) -> dict[tuple[str, int], str]:
    """Map ("k" or "v", layer) to the names of stored scales for cached keys and values."""
    found = (_KV_SCALE.fullmatch(name) for name in stored)
    return {(match[4], int(match[2])): match[0] for match in found if match}


def make_unfused_recipe(path: str, shape: Shape, stored: Iterable[str]) -> Recipe:
    """Make a parameter's recipe from matrices, one per expert, as quantizers write it.

    Args:
        path: of the parameter, as in "text/layer_3/feed_forward/down".
        shape: of the parameter.
        stored: the names of the source's tensors, which show whether names have a prefix.
    """
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in stored) else ""
    return _list_recipes(path, shape, prefix)[-1]


def unfuse_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unfuse experts `[E, in, out]` into matrices `[out, in]`, named as `make_unfused_recipe` does;
    keep other tensors."""
    found: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        if values.ndim < 3:
            found[name] = values
            continue
        module, _, projection = name.rpartition(".")
        halves = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
        for expert, fused in enumerate(values):
            for half, matrix in zip(halves, np.split(fused, len(halves), axis=1), strict=True):
                found[f"{module}.{expert}.{half}.weight"] = np.ascontiguousarray(matrix.T)
    return found


def list_linears(stored: Mapping[str, TensorSpec]) -> list[str]:
    """List the modules that quantizers count as `Linear`, by their stored weights."""
    return [
        name.removesuffix(".weight")
        for name, (_, shape) in stored.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed_tokens" not in name
    ]


def detect_quantization(stored: Mapping[str, TensorSpec]) -> str | None:
    """Detect how tensors are quantized, by names and dtypes; None for an unquantized checkpoint."""
    packed: set[str] = set()
    suffixes: set[str] = set()
    for name, (dtype, _) in stored.items():
        if _KV_SCALE.fullmatch(name):
            continue
        if found := _QUANTIZATION_TENSOR.fullmatch(name):
            is_fused = found["joint"] == "_" and found["suffix"] != "weight_scale_2"
            suffixes.add("fused" if is_fused else found["suffix"])
            if found["suffix"] == "weight_packed":
                packed.add(dtype)
    dtypes = {dtype for dtype, _ in stored.values()}
    if "weight_scale_2" in suffixes:
        return "modelopt nvfp4"
    if "U8" in packed:
        return "compressed-tensors nvfp4-pack-quantized"
    if packed:
        return "compressed-tensors pack-quantized int4"
    if "fused" in suffixes or "input_scale" in suffixes:
        return "modelopt fp8"
    if dtypes & {"F8_E4M3", "F8_E5M2"}:
        return "compressed-tensors float-quantized fp8"
    if "I8" in dtypes:
        return "compressed-tensors int-quantized int8"
    return f"an unknown format with {list_few(sorted(suffixes))}" if suffixes else None


def _choose_recipe(path: str, shape: Shape, prefix: str, weights: set[str]) -> Recipe:
    """Choose the recipe whose tensors are stored; if none are, the published one."""
    recipes = _list_recipes(path, shape, prefix)
    return next((recipe for recipe in recipes if recipe.sources[0].name in weights), recipes[0])


def _list_recipes(path: str, shape: Shape, prefix: str) -> list[Recipe]:
    layer = re.search(r"/layer_(\d+)/", path)
    recipes = []
    for layout in TABLE[_generalize(path)]:
        if layout.rank == len(shape):
            names = [name.replace("*", layer[1] if layer else "") for name in layout.names]
            if path.startswith("text/"):
                names = [prefix + name for name in names]
            recipes.append(layout.make_recipe(shape, *names))
    return recipes


def _generalize(path: str) -> str:
    """Replace the number of the layer in a path by `*`."""
    return re.sub(r"/layer_\d+/", "/layer_*/", path)
