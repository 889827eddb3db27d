"""Every bundle of kernels that runs here keeps the laws: the portable one always, and Hopper's,
interpreted, where jax can interpret it."""

import dataclasses
from typing import Any

import jax
import pytest

from l4jax.kernels import PORTABLE
from tests.kernels import laws

SIZES = laws.Sizes(width=256, hidden=128)
BUNDLES: dict[str, Any] = {"portable": PORTABLE}
if jax.__version_info__ >= (0, 12):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from l4jax.kernels.hopper import Hopper

    # Each of so few multiprocessors has several items of work, and yet attention of a long row
    # alone is cut into parts.
    BUNDLES["hopper"] = Hopper(4, plgpu.InterpretGPUParams())


HOLDING, PAIRED = (
    [dataclasses.replace(BUNDLES["hopper"], **way)] if "hopper" in BUNDLES else []
    for way in ({"held": 8}, {"is_paired": True})
)


@pytest.fixture(params=BUNDLES)
def kernels(request):
    return BUNDLES[request.param]


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_norm_equals_its_definition(kernels, tokens):
    laws.check_norm(kernels, tokens, SIZES)


@pytest.mark.parametrize("choice", laws.CHOICES)
@pytest.mark.parametrize("form", laws.FORMATS)
def test_experts_equal_their_definition(kernels, form, choice):
    laws.check_experts(kernels, form, laws.CHOICES[choice], SIZES)


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("form", laws.FORMATS)
def test_products_equal_their_definition(kernels, form, tokens):
    laws.check_products(kernels, form, tokens, SIZES)


@pytest.mark.parametrize("choice", [[2], [3, 0, 1, 2, 0], [1, 1, 1, 3, 0, 3, 1, 1]])
@pytest.mark.parametrize("holding", HOLDING, ids=["hopper"])
def test_experts_of_tokens_that_are_held_equal_their_definition(holding, choice):
    laws.check_experts(holding, "fp8", choice, SIZES)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("holding", HOLDING, ids=["hopper"])
def test_products_of_tokens_that_are_held_equal_their_definition(holding, tokens):
    laws.check_products(holding, "fp8", tokens, SIZES)


@pytest.mark.parametrize("tokens", [1, 13])
def test_logits_equal_their_definition(kernels, tokens):
    laws.check_head(kernels, tokens, SIZES)


@pytest.mark.parametrize("context", laws.make_contexts(SIZES.page))
@pytest.mark.parametrize("form", laws.PAGES)
def test_attention_equals_its_definition(kernels, form, context):
    laws.check_attention(kernels, form, laws.make_contexts(SIZES.page)[context], SIZES)


@pytest.mark.parametrize("context", ["decode", "mixed"])
@pytest.mark.parametrize("form", laws.PAGES)
@pytest.mark.parametrize("paired", PAIRED, ids=["hopper"])
def test_attention_to_two_kv_heads_at_once_equals_its_definition(paired, form, context):
    sizes = dataclasses.replace(SIZES, page=128)  # attended in halves
    laws.check_attention(paired, form, laws.make_contexts(sizes.page)[context], sizes)
