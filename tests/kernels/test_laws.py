"""Laws of every kernel bundle that runs here: the portable one, and Hopper's in the interpreter."""

import dataclasses
from typing import Any

import jax
import pytest

from l4jax.kernels import PORTABLE
from tests import tiers
from tests.kernels import laws

SIZES = laws.Sizes(width=256, hidden=128)
BUNDLES: dict[str, Any] = {"portable": PORTABLE}
if jax.__version_info__ >= (0, 12):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from l4jax.kernels.hopper.dispatch import Hopper

    # Few SMs: each has several work items, and attention of a single long row is still split.
    interpret = plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
    BUNDLES["hopper"] = Hopper(4, interpret)


@pytest.fixture(params=BUNDLES)
def kernels(request):
    return BUNDLES[request.param]


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_norm_equals_its_definition(kernels, tokens):
    laws.check_norm(kernels, tokens, SIZES)


@pytest.mark.parametrize("tokens", [1, 13])
def test_routes_equal_their_definition(kernels, tokens):
    laws.check_route(kernels, tokens, SIZES)


@pytest.mark.parametrize(("choice", "form"), tiers.pairs(list(laws.CHOICES), laws.FORMATS))
def test_experts_equal_their_definition(kernels, form, choice):
    laws.check_experts(kernels, form, laws.CHOICES[choice], SIZES)


@pytest.mark.slow
def test_experts_of_as_many_tokens_as_may_be_resident_equal_their_definition(kernels):
    laws.check_experts(kernels, "fp8", laws.RESIDENT["the most"], SIZES)


@pytest.mark.slow
def test_experts_without_the_shared_one_in_their_launches_equal_their_definition(kernels):
    laws.check_experts(kernels, "fp8", [1] * 3 + [0, 3, 3, 0] * 9, SIZES)


@pytest.mark.parametrize("tokens", tiers.every(2, [3, 8]))
def test_products_of_resident_tokens_equal_their_definition(kernels, tokens):
    laws.check_products(kernels, "fp8", tokens, SIZES)


@pytest.mark.parametrize(("form", "tokens"), tiers.pairs(laws.FORMATS, [1, 13]))
def test_products_equal_their_definition(kernels, form, tokens):
    laws.check_products(kernels, form, tokens, SIZES)


@pytest.mark.parametrize("tokens", tiers.every(2, [13, 1]))
def test_logits_equal_their_definition(kernels, tokens):
    laws.check_head(kernels, tokens, SIZES)


@pytest.mark.parametrize(
    ("context", "form"), tiers.pairs(list(laws.make_contexts(SIZES.page)), list(laws.PAGES))
)
def test_attention_equals_its_definition(kernels, form, context):
    laws.check_attention(kernels, form, laws.make_contexts(SIZES.page)[context], SIZES)


@pytest.mark.parametrize("context", tiers.every(2, ["decode", "mixed"]))
@pytest.mark.parametrize("form", laws.PAGES)
def test_attention_to_halves_of_long_pages_equals_its_definition(kernels, form, context):
    sizes = dataclasses.replace(SIZES, page=128)
    laws.check_attention(kernels, form, laws.make_contexts(sizes.page)[context], sizes)


@pytest.mark.parametrize("form, transform", laws.TRANSFORM_CASES)
def test_transformed_heads_equal_their_definition(kernels, form, transform):
    laws.check_head_transform(kernels, form, transform, 3, SIZES, is_prompt=False)


def test_heads_of_a_prompt_equal_their_definition(kernels):
    # More tokens than a memory-bound matmul has: the library leaves the column scales to apply.
    sizes = dataclasses.replace(SIZES, kv_heads=1)
    laws.check_head_transform(kernels, "fp8", "all", 130, sizes, is_prompt=True)


@pytest.mark.slow
def test_heads_on_pages_of_another_size_equal_their_definition(kernels):
    sizes = dataclasses.replace(SIZES, page=32)  # a page size that falls back to plain XLA
    laws.check_head_transform(kernels, "fp8", "all", 3, sizes, is_prompt=False)
