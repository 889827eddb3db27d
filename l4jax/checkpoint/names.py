"""The published names: one table that says which stored tensors make up each parameter.

The only file that knows how Hugging Face spells Llama 4. `*` is the layer, `#` the expert.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from l4jax.checkpoint.errors import CheckpointError, list_few
from l4jax.checkpoint.quantize import Nvfp4Recipe, QuantizedRecipe, resolve
from l4jax.checkpoint.recipe import Recipe
from l4jax.checkpoint.rules import (
    Shape,
    join_heads,
    stack,
    stack_biases,
    stack_experts,
    take,
    turn_experts,
)
from l4jax.checkpoint.safetensors import Kind


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to make a parameter of a certain rank."""

    rank: int
    rule: Callable[..., Recipe]
    names: tuple[str, ...]


_LAYER = "model.layers.*."
_FEED, _ATTEND = _LAYER + "feed_forward.", _LAYER + "self_attn."
_SHARED, _EXPERT = _FEED + "shared_expert.", _FEED + "experts.#."
_EYE = "vision_model.model.layers.*."
_EYE_ATTEND = _EYE + "self_attn."


def _add(rank: int, rule: Callable[..., Recipe], *names: str) -> list[Row]:
    return [Row(rank, rule, names)]


TABLE: Mapping[str, list[Row]] = {
    "text/embedding": _add(2, take, "model.embed_tokens.weight"),
    "text/head": _add(2, take, "lm_head.weight"),
    "text/norm/scale": _add(1, take, "model.norm.weight"),
    "text/layer_*/attention_norm/scale": _add(1, take, _LAYER + "input_layernorm.weight"),
    "text/layer_*/feed_forward_norm/scale": _add(
        1, take, _LAYER + "post_attention_layernorm.weight"
    ),
    "text/layer_*/attention/qkv": _add(
        4, join_heads, *(f"{_ATTEND}{x}_proj.weight" for x in ("q", "k", "v"))
    ),
    "text/layer_*/attention/out": _add(4, take, _ATTEND + "o_proj.weight"),
    "text/layer_*/feed_forward/router": _add(2, take, _FEED + "router.weight"),
    "text/layer_*/feed_forward/gate_up": [
        *_add(3, stack, _FEED + "gate_proj.weight", _FEED + "up_proj.weight"),
        *_add(4, turn_experts, _FEED + "experts.gate_up_proj"),
        *_add(4, stack_experts, _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    ],
    "text/layer_*/feed_forward/down": [
        *_add(2, take, _FEED + "down_proj.weight"),
        *_add(3, turn_experts, _FEED + "experts.down_proj"),
        *_add(3, stack_experts, _EXPERT + "down_proj.weight"),
    ],
    "text/layer_*/feed_forward/shared/gate_up": _add(
        3, stack, _SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"
    ),
    "text/layer_*/feed_forward/shared/down": _add(2, take, _SHARED + "down_proj.weight"),
    "vision/patch": _add(2, take, "vision_model.patch_embedding.linear.weight"),
    "vision/class_embedding": _add(1, take, "vision_model.class_embedding"),
    "vision/position_embedding": _add(2, take, "vision_model.positional_embedding_vlm"),
    "vision/norm_before/scale": _add(1, take, "vision_model.layernorm_pre.weight"),
    "vision/norm_before/bias": _add(1, take, "vision_model.layernorm_pre.bias"),
    "vision/norm_after/scale": _add(1, take, "vision_model.layernorm_post.weight"),
    "vision/norm_after/bias": _add(1, take, "vision_model.layernorm_post.bias"),
    "vision/layer_*/attention_norm/scale": _add(1, take, _EYE + "input_layernorm.weight"),
    "vision/layer_*/attention_norm/bias": _add(1, take, _EYE + "input_layernorm.bias"),
    "vision/layer_*/mlp_norm/scale": _add(1, take, _EYE + "post_attention_layernorm.weight"),
    "vision/layer_*/mlp_norm/bias": _add(1, take, _EYE + "post_attention_layernorm.bias"),
    "vision/layer_*/qkv": _add(
        4, stack, *(f"{_EYE_ATTEND}{x}_proj.weight" for x in ("q", "k", "v"))
    ),
    "vision/layer_*/qkv_bias": _add(
        3, stack_biases, *(f"{_EYE_ATTEND}{x}_proj.bias" for x in ("q", "k", "v"))
    ),
    "vision/layer_*/out": _add(3, take, _EYE_ATTEND + "o_proj.weight"),
    "vision/layer_*/out_bias": _add(1, take, _EYE_ATTEND + "o_proj.bias"),
    "vision/layer_*/up": _add(2, take, _EYE + "mlp.fc1.weight"),
    "vision/layer_*/up_bias": _add(1, take, _EYE + "mlp.fc1.bias"),
    "vision/layer_*/down": _add(2, take, _EYE + "mlp.fc2.weight"),
    "vision/layer_*/down_bias": _add(1, take, _EYE + "mlp.fc2.bias"),
    "vision/adapter/first": _add(2, take, "vision_model.vision_adapter.mlp.fc1.weight"),
    "vision/adapter/second": _add(2, take, "vision_model.vision_adapter.mlp.fc2.weight"),
    "vision/projector": _add(2, take, "multi_modal_projector.linear_1.weight"),
}

# How many of the last axes of each matrix are summed over.
SUMMED: Mapping[str, int] = {
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
FUSED = ("gate_up_proj", "down_proj")

# What a whole model puts before the text model's names, and a text-only one does not.
_PREFIX = "language_model."
# RoPE's frequencies, which some tools save: they follow from the config, and are computed from it.
_HARMLESS = re.compile(r".*rotary_emb(edding)?\.(inv_freq|original_inv_freq|freqs_ci)")
# What cached keys and values are divided by, where a quantizer calibrated it: one of each a layer.
_KV_SCALE = re.compile(
    r"(language_model\.)?model\.layers\.(\d+)\.self_attn\.([kv]_proj\.)?([kv])_scale"
)
# What quantizers write beside a weight, or instead of it (`weight_packed`).
_BESIDE = re.compile(
    r"(?P<base>.*)(?P<joint>[._])(?P<what>weight_(packed|shape|scale|scale_2|g_idx|zero_point|global_scale)"
    r"|(input|output)_(scale|zero_point|global_scale)|[kv]_scale)"
)
# What `find_quantization` may say of a checkpoint that can be loaded.
COMPUTED = (
    "compressed-tensors float-quantized fp8",
    "compressed-tensors pack-quantized int4",
    "compressed-tensors nvfp4-pack-quantized",
    "modelopt fp8",
    "modelopt nvfp4",
)
# Which matrices those who publish quantized checkpoints take: routed experts alone; shared ones and
# dense layers, too; and attention.
ROUTED = re.compile(r".*\.feed_forward\.experts\..*")
FEED_FORWARD = re.compile(r".*\.feed_forward\.(?!router).*")
TEXT_LINEAR = re.compile(r"(?!vision_model\.).*\.(self_attn|feed_forward)\.(?!router).*")
KEY_OR_VALUE = re.compile(r".*\.self_attn\.([kv])_proj")
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class Survey:
    """What names alone tell: a recipe for each parameter, what nobody asks for, what is absent."""

    recipes: Mapping[str, Recipe]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]


def survey(shapes: Mapping[str, Shape], stored: Iterable[str]) -> Survey:
    """Pair parameters (path -> shape) with stored names, quantized or not; look no further."""
    passed_over = (_HARMLESS, _KV_SCALE)
    left = {name for name in stored if not any(rule.fullmatch(name) for rule in passed_over)}
    weights, beside = set(left), {}
    for name in left:
        if found := _BESIDE.fullmatch(name):
            weights.discard(name)
            whole = found["base"] + (".weight" if found["joint"] == "." else "")
            beside.setdefault(whole, []).append(name)
            if found["what"] == "weight_packed":
                weights.add(whole)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in left) else ""
    recipes = {path: _choose(path, shape, prefix, weights) for path, shape in shapes.items()}
    wanted = {part.name for recipe in recipes.values() for part in recipe.parts}
    unknown = weights - wanted
    for whole, names in beside.items():
        if whole not in wanted:
            unknown.discard(whole)
            unknown.update(names)
    return Survey(recipes, tuple(sorted(unknown)), tuple(sorted(wanted - weights)))


def match(
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Kind],
    where: str,
    files: Mapping[str, str] | None = None,
) -> dict[str, Recipe | QuantizedRecipe | Nvfp4Recipe]:
    """The recipe of every parameter: each stored tensor is used exactly once, each shape is right.

    Args:
        shapes: path -> shape of every parameter, as in "text/layer_3/attention/qkv".
        stored: name -> (dtype, shape) of every tensor.
        where: what holds them, for errors.
        files: name -> the file that holds it, for errors about one tensor.

    Raises:
        CheckpointError: naming the tensors that are unknown, missing, or of another shape.
    """
    if (found := find_quantization(stored)) and found not in COMPUTED:
        raise CheckpointError(
            f"{where} is quantized ({found}), which is not supported yet: "
            f"take one in BF16, or one of these: {', '.join(COMPUTED)}."
        )

    def locate(name: str) -> str:
        return (files or {}).get(name, where)

    surveyed = survey(shapes, stored)
    lists = {"lacks": surveyed.missing, "has unknown": surveyed.unknown}
    if problems := [f"{how} {list_few(names)}" for how, names in lists.items() if names]:
        raise CheckpointError(
            f"{where} {' and '.join(problems)}: "
            "its tensors are not those of the model in its config.json."
        )
    resolved = {
        path: resolve(path, recipe, stored, locate) for path, recipe in surveyed.recipes.items()
    }
    plain = [recipe for recipe in resolved.values() if isinstance(recipe, Recipe)]
    fp8 = [
        recipe.data
        for recipe in resolved.values()
        if isinstance(recipe, QuantizedRecipe) and not recipe.is_packed
    ]
    wrong = [
        (part.name, f"{part.name} {list(stored[part.name][1])} instead of {list(part.stored)}")
        for recipe in (*plain, *fp8)
        for part in recipe.parts
        if tuple(stored[part.name][1]) != part.stored
    ]
    if wrong:
        raise CheckpointError(
            f"{locate(wrong[0][0])} has {list_few([text for _, text in wrong])}: "
            "its config.json belongs to another model."
        )
    odd = [
        (part.name, f"{part.name} ({stored[part.name][0]})")
        for recipe in plain
        for part in recipe.parts
        if stored[part.name][0] not in _FLOATS
    ]
    if odd:
        raise CheckpointError(
            f"{locate(odd[0][0])} has {list_few([text for _, text in odd])}: "
            f"weights must be {', '.join(_FLOATS)}."
        )
    return resolved


def publish(path: str, value: np.ndarray, *, is_whole: bool) -> dict[str, np.ndarray]:
    """The tensors that a parameter is published as, in BF16's layout: the inverse of loading it.

    Args:
        path: of the parameter, as in "text/layer_3/attention/qkv".
        value: of the parameter.
        is_whole: whether the checkpoint holds the vision tower too, which changes the names.
    """
    recipe = find_published(path, value.shape, is_whole=is_whole)
    value = value.transpose(np.argsort(recipe.turn))
    boxes = {
        part.name: value[tuple(map(slice, part.start, np.add(part.start, part.shape)))]
        for part in recipe.parts
    }
    return {part.name: boxes[part.name].reshape(part.stored) for part in recipe.parts}


def find_published(path: str, shape: Shape, *, is_whole: bool) -> Recipe:
    """The recipe of a parameter from what it is published as; `is_whole` as for `publish`."""
    return _choose(path, shape, _PREFIX if is_whole else "", set())


def forget_prefix(name: str) -> str:
    """A name, or what begins with one, as a text-only checkpoint has it."""
    return name.removeprefix(_PREFIX)


def count_summed(path: str) -> int | None:
    """How many of a parameter's last axes are summed over; None for what is no matrix of a product,
    and for the embedding, which is looked up in."""
    return SUMMED.get(re.sub(r"/layer_\d+/", "/layer_*/", path))


def find_kv_scales(stored: Iterable[str]) -> dict[tuple[str, int], str]:
    """The stored scales of cached keys and values: ("k" or "v", layer) -> name."""
    found = (_KV_SCALE.fullmatch(name) for name in stored)
    return {(match[4], int(match[2])): match[0] for match in found if match}


def separate(path: str, shape: Shape, stored: Iterable[str]) -> Recipe:
    """The recipe of a parameter from matrices, the experts one by one: as the quantizers write it.

    Args:
        path: of the parameter, as in "text/layer_3/feed_forward/down".
        shape: of it.
        stored: the names of the tensors that it is made from now, which tell how names begin.
    """
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in stored) else ""
    return _list_ways(path, shape, prefix)[-1]


def split_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused experts `[E, in, out]` as matrices `[out, in]`, named as `separate` has them; the rest
    as it is."""
    found: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        if values.ndim < 3:
            found[name] = values
            continue
        at, _, projection = name.rpartition(".")
        halves = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
        for expert, both in enumerate(values):
            for half, matrix in zip(halves, np.split(both, len(halves), axis=1), strict=True):
                found[f"{at}.{expert}.{half}.weight"] = np.ascontiguousarray(matrix.T)
    return found


def list_linears(stored: Mapping[str, Kind]) -> list[str]:
    """The modules that quantizers count as `Linear`, by their stored weights."""
    return [
        name.removesuffix(".weight")
        for name, (_, shape) in stored.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed_tokens" not in name
    ]


def find_quantization(stored: Mapping[str, Kind]) -> str | None:
    """How tensors are quantized, told by names and dtypes alone; None for a plain checkpoint."""
    packed: set[str] = set()
    beside: set[str] = set()
    for name, (dtype, _) in stored.items():
        if _KV_SCALE.fullmatch(name):
            continue
        if found := _BESIDE.fullmatch(name):
            is_fused = found["joint"] == "_" and found["what"] != "weight_scale_2"
            beside.add("fused" if is_fused else found["what"])
            if found["what"] == "weight_packed":
                packed.add(dtype)
    dtypes = {dtype for dtype, _ in stored.values()}
    if "weight_scale_2" in beside:
        return "modelopt nvfp4"
    if "U8" in packed:
        return "compressed-tensors nvfp4-pack-quantized"
    if packed:
        return "compressed-tensors pack-quantized int4"
    if "fused" in beside or "input_scale" in beside:
        return "modelopt fp8"
    if dtypes & {"F8_E4M3", "F8_E5M2"}:
        return "compressed-tensors float-quantized fp8"
    if "I8" in dtypes:
        return "compressed-tensors int-quantized int8"
    return f"an unknown format with {list_few(sorted(beside))}" if beside else None


def _choose(path: str, shape: Shape, prefix: str, weights: set[str]) -> Recipe:
    """The way that the stored names take; where they take none, the published one."""
    recipes = _list_ways(path, shape, prefix)
    return next((recipe for recipe in recipes if recipe.parts[0].name in weights), recipes[0])


def _list_ways(path: str, shape: Shape, prefix: str) -> list[Recipe]:
    layer = re.search(r"/layer_(\d+)/", path)
    rows = TABLE[re.sub(r"/layer_\d+/", "/layer_*/", path)]
    recipes = []
    for row in rows:
        if row.rank == len(shape):
            names = [name.replace("*", layer[1] if layer else "") for name in row.names]
            if path.startswith("text/"):
                names = [prefix + name for name in names]
            recipes.append(row.rule(shape, *names))
    return recipes
