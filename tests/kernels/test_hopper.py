"""Ways of Hopper's kernels that are not taken yet keep the laws, interpreted."""

import dataclasses

import jax
import pytest

from tests.kernels import laws

if jax.__version_info__ < (0, 12):
    pytest.skip("jax interprets the kernels from 0.12 on", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.hopper import Hopper

SIZES = laws.Sizes(width=256, hidden=128)
KERNELS = Hopper(4, plgpu.InterpretGPUParams(), held=8, is_paired=True)


@pytest.mark.parametrize("choice", [[2], [3, 0, 1, 2, 0], [1, 1, 1, 3, 0, 3, 1, 1]])
def test_experts_of_tokens_that_are_held_equal_their_definition(choice):
    laws.check_experts(KERNELS, "fp8", choice, SIZES)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_products_of_tokens_that_are_held_equal_their_definition(tokens):
    laws.check_products(KERNELS, "fp8", tokens, SIZES)


@pytest.mark.parametrize("context", ["decode", "mixed"])
@pytest.mark.parametrize("form", laws.PAGES)
def test_attention_to_two_kv_heads_at_once_equals_its_definition(form, context):
    sizes = dataclasses.replace(SIZES, page=128)  # attended in halves
    laws.check_attention(KERNELS, form, laws.make_contexts(sizes.page)[context], sizes)
