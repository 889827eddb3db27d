"""Laws of the compiled kernels on a Hopper GPU, with the shapes of Scout too."""

import dataclasses

import jax
import pytest

from l4jax.engine.local_kernels import choose_kernels
from tests.kernels import laws

pytestmark = pytest.mark.gpu

SMALL = laws.Sizes(width=256, hidden=128)
SCOUT = laws.Sizes(width=5120, hidden=8192, vocab=202048, kv_heads=8, page=128)
CONTEXTS = {
    **laws.make_contexts(SCOUT.page),
    "decode of many": ([1 + 7 * row for row in range(40)], [1] * 40, 0),
}
SPREAD = {"64 tokens": 64, "an odd number": 101, "a prompt": 1500}


@pytest.fixture(scope="module")
def kernels():
    return choose_kernels("hopper", jax.devices("gpu")[0])


@pytest.mark.parametrize("tokens", [1, 8, 128, 300])
def test_norms_of_scout_equal_their_definition(kernels, tokens):
    laws.check_norm(kernels, tokens, SCOUT)


@pytest.mark.parametrize("tokens", [1, 8, 9, 128, 256, 300])
def test_routes_of_scout_equal_their_definition(kernels, tokens):
    laws.check_route(kernels, tokens, SCOUT)


@pytest.mark.parametrize("shared_blocks", [0, 3])
@pytest.mark.parametrize("tokens", [4, 8, 128, 256])
def test_one_launch_assigns_the_slots_of_the_definition(tokens, shared_blocks):
    from l4jax.kernels.hopper.slot_assignment import assign_slots_in_kernel

    laws.check_slots(assign_slots_in_kernel, tokens, experts=16, shared_blocks=shared_blocks)


@pytest.mark.parametrize("choice", laws.CHOICES)
@pytest.mark.parametrize("form", laws.FORMATS)
def test_experts_equal_their_definition(kernels, form, choice):
    laws.check_experts(kernels, form, laws.CHOICES[choice], SMALL)


@pytest.mark.parametrize("tokens", SPREAD)
@pytest.mark.parametrize("form", laws.FORMATS)
def test_experts_of_many_tokens_equal_their_definition(kernels, form, tokens):
    choice = [token * 7 % 11 % 4 for token in range(SPREAD[tokens])]
    laws.check_experts(kernels, form, choice, SMALL)


@pytest.mark.parametrize("tokens", [1, 3, 8, 128, 300])
@pytest.mark.parametrize("form", laws.FORMATS)
def test_products_of_scout_equal_their_definition(kernels, form, tokens):
    laws.check_products(kernels, form, tokens, SCOUT)


@pytest.mark.parametrize("tokens", [1, 8, 128])
def test_logits_of_scout_equal_their_definition(kernels, tokens):
    laws.check_head(kernels, tokens, SCOUT)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("form", laws.PAGES)
def test_attention_of_scout_equals_its_definition(kernels, form, context):
    laws.check_attention(kernels, form, CONTEXTS[context], SCOUT)


@pytest.mark.parametrize("choice", laws.RESIDENT)
def test_experts_of_resident_tokens_equal_their_definition(kernels, choice):
    laws.check_experts(
        kernels, "fp8", laws.RESIDENT[choice], dataclasses.replace(SCOUT, hidden=512)
    )


def test_one_launch_keeps_the_token_order_of_the_definition():
    from l4jax.kernels.hopper.slot_assignment import assign_slots_in_kernel

    laws.check_order(assign_slots_in_kernel, 8, experts=16, shared_blocks=1)


@pytest.mark.parametrize("form, transform", laws.TRANSFORM_CASES)
def test_transformed_heads_of_scout_equal_their_definition(kernels, form, transform):
    laws.check_head_transform(kernels, form, transform, 3, SCOUT, is_prompt=False)


@pytest.mark.parametrize("form", laws.FORMATS)
def test_heads_of_a_prompt_of_scout_equal_their_definition(kernels, form):
    laws.check_head_transform(kernels, form, "all", 300, SCOUT, is_prompt=True)
