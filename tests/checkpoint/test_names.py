"""Laws of the name table: each published tensor is used once, mismatches are named."""

import functools
import math
import re

import jax.numpy as jnp
import pytest

from l4jax.checkpoint import CheckpointError
from l4jax.checkpoint.names import detect_quantization, match_names, match_tensors
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.quantized_reader import QuantizedRecipe
from l4jax.checkpoint.recipe import Recipe
from l4jax.config import MAVERICK, SCOUT, Config
from l4jax.model import declare_parameters
from l4jax.strategies import TENSOR
from sharding import Layout, make_mesh
from tests.checkpoint.published import read_published

PUBLISHED = {  # tensors, parameters (of unquantized ones), config
    "scout-instruct": (1133, 108_641_793_536, SCOUT),
    "maverick-instruct": (1061, 401_583_781_376, MAVERICK),
    "maverick-instruct-fp8": (19445, None, MAVERICK),
    "scout-instruct-fp8-dynamic": (5789, None, SCOUT),
    "scout-instruct-w4a16": (8237, None, SCOUT),
}
BYTES = {"BF16": 2, "F8_E4M3": 1, "I32": 4, "I64": 8}
Stored = dict[str, tuple[str, tuple[int, ...]]]


@functools.cache
def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    shapes, _ = declare_parameters(config, jnp.bfloat16)
    return {path: leaf.shape for path, leaf in flatten(shapes).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tensors_match_the_models_parameters(name: str) -> None:
    tensors, _, config = PUBLISHED[name]
    stored = read_published()[name]
    assert len(stored) == tensors
    matched = match_names(_shapes(config), stored)
    assert matched.unknown == ()
    assert matched.missing == ()
    assert set(matched.recipes) == set(_shapes(config))


@pytest.mark.parametrize("name", ["scout-instruct", "maverick-instruct"])
def test_unquantized_checkpoint_fills_each_parameter_once(name: str) -> None:
    _, parameters, config = PUBLISHED[name]
    stored, shapes = read_published()[name], _shapes(config)
    recipes = match_tensors(shapes, stored, name)
    used = [source.name for recipe in recipes.values() for source in recipe.sources]
    assert sorted(used) == sorted(stored)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert sum(math.prod(shape) for _, shape in stored.values()) == parameters
    for path, recipe in recipes.items():
        assert isinstance(recipe, Recipe)
        assert sum(math.prod(source.shape) for source in recipe.sources) == math.prod(recipe.shape)
        assert recipe.to_file_order([str(size) for size in shapes[path]]) == tuple(
            str(size) for size in recipe.shape
        )


def test_scout_takes_217_gigabytes() -> None:
    parameters = sum(math.prod(shape) for shape in _shapes(SCOUT).values())
    assert round(2 * parameters / 1e9, 1) == 217.3


@pytest.mark.parametrize(
    ("name", "gigabytes", "quantized"),
    [
        ("scout-instruct", 217.3, set()),
        ("maverick-instruct", 803.2, set()),
        ("maverick-instruct-fp8", 416.8, {"gate_up", "down"}),
        ("scout-instruct-fp8-dynamic", 114.6, {"gate_up", "down", "shared/gate_up", "shared/down"}),
        ("scout-instruct-w4a16", 64.9, {"gate_up", "down", "shared/gate_up", "shared/down"}),
    ],
)
def test_device_bytes_equal_file_bytes(name: str, gigabytes: float, quantized: set[str]) -> None:
    """On eight devices each has an eighth, except for replicated parameters."""
    stored = read_published()[name]
    config = PUBLISHED[name][2]
    names = flatten(declare_parameters(config, jnp.bfloat16)[1])
    recipes = match_tensors(_shapes(config), stored, name)
    found = {path for path, recipe in recipes.items() if isinstance(recipe, QuantizedRecipe)}
    assert {re.sub(r"text/layer_\d+/feed_forward/", "", path) for path in found} == quantized
    layout = Layout(make_mesh("8"), TENSOR)

    def count(path: str, recipe: Recipe, size: float) -> tuple[float, float]:
        shape = recipe.parameter_shape
        place = layout.place(names[path][: len(shape)])
        return math.prod(shape) * size, math.prod(place.shard_shape(shape)) * size

    counts = []
    for path, recipe in recipes.items():
        if isinstance(recipe, QuantizedRecipe):
            counts.append(count(path, recipe.data, 4 if recipe.is_packed else 1))
            counts.append(count(path, recipe.scale, 2))
        else:
            assert isinstance(recipe, Recipe)
            counts.append(count(path, recipe, 2))
    total, each = map(sum, zip(*counts, strict=True))
    in_files = sum(math.prod(shape) * BYTES[dtype] for dtype, shape in stored.values())
    assert total == pytest.approx(in_files, rel=1e-6)  # without `weight_shape`, 16 bytes per matrix
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert 1 / 8 <= each / total < 1.03 / 8


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"a.weight": "BF16"}, None),
        ({"a.weight_packed": "U8", "a.weight_global_scale": "F32"}, "nvfp4-pack-quantized"),
        ({"a.weight": "U8", "a.weight_scale_2": "F32"}, "modelopt nvfp4"),
        ({"experts.down_proj": "U8", "experts.down_proj_weight_scale_2": "F32"}, "modelopt nvfp4"),
        ({"a.weight": "F8_E4M3", "a.input_scale": "F32"}, "modelopt fp8"),
        ({"experts.down_proj": "F8_E4M3", "experts.down_proj_weight_scale": "F32"}, "modelopt fp8"),
        ({"a.weight": "F8_E5M2"}, "float-quantized fp8"),
        ({"a.weight": "I8", "a.weight_scale": "F32"}, "int8"),
        ({"a.weight": "BF16", "a.weight_scale": "F32"}, "unknown format with weight_scale"),
    ],
)
def test_quantization_is_detected_from_tensors(
    dtypes: dict[str, str], expected: str | None
) -> None:
    found = detect_quantization({name: (dtype, (2,)) for name, dtype in dtypes.items()})
    assert found == expected if found is None or expected is None else expected in found


def test_text_only_checkpoint_has_no_prefix_and_no_vision() -> None:
    config = Config(SCOUT.text, None, 1, (2,), None, None)
    stored = {
        name.removeprefix("language_model."): spec
        for name, spec in read_published()["scout-instruct"].items()
        if name.startswith("language_model.")
    }
    assert len(match_tensors(_shapes(config), stored, "here")) == len(_shapes(config))


def test_saved_rope_frequencies_are_ignored() -> None:
    stored = dict(read_published()["scout-instruct"])
    stored["language_model.model.rotary_emb.inv_freq"] = "F32", (64,)
    stored["vision_model.rotary_embedding.freqs_ci"] = "C64", (577, 44)
    match_tensors(_shapes(SCOUT), stored, "here")


def _refuse(stored: Stored, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        match_tensors(_shapes(SCOUT), stored, "some folder")


def test_mismatched_tensors_are_named() -> None:
    whole = read_published()["scout-instruct"]
    layer = "language_model.model.layers.7."
    router, query = layer + "feed_forward.router.weight", layer + "self_attn.q_proj.weight"
    _refuse({**whole, "odd.weight": ("BF16", (2,))}, r"some folder has unknown odd\.weight:")
    _refuse({k: v for k, v in whole.items() if k != router}, rf"some folder lacks {router}:")
    _refuse(
        {**whole, query: ("BF16", (5120, 5121))},
        rf"{query} \[5120, 5121\] instead of \[5120, 5120\]",
    )
    _refuse({**whole, query: ("I32", (5120, 5120))}, rf"{query} \(I32\)")
    _refuse({}, r"lacks .*, .*, .* and 1130 more")
    # A transposed matrix has as many elements, and is refused.
    transposed = ("BF16", (5120, 1024))
    _refuse(
        {**whole, layer + "self_attn.k_proj.weight": transposed}, r"k_proj\.weight \[5120, 1024\]"
    )


def test_mixed_fused_and_unfused_experts_are_refused() -> None:
    stored = dict(read_published()["scout-instruct"])
    at = "language_model.model.layers.0.feed_forward.experts."
    stored[at + "3.down_proj.weight"] = "BF16", (5120, 8192)
    _refuse(stored, r"has unknown .*experts\.3\.down_proj\.weight")
    del stored[at + "down_proj"]
    _refuse(
        stored, r"lacks .*experts\.down_proj .*has unknown .*experts\.3|lacks .*experts\.0\.down"
    )
