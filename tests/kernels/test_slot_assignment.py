"""Slot assignment: tokens of an expert side by side in its blocks, and no two in one slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.kernels.hopper.slot_assignment import (
    assign_slots,
    count_blocks,
    keep_token_order,
)

EXPERTS = 5
CHOICES = {
    "one token": [3],
    "all on one": [4] * 20,
    "spread": [0, 4, 1, 1, 3, 0, 4, 4, 4],
    "many": list(np.random.default_rng(0).integers(0, EXPERTS, 1100)),
}


@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("choice", CHOICES)
def test_each_token_has_a_slot_of_its_own_in_a_block_of_its_expert(choice, slots):
    expert_T = np.array(CHOICES[choice], np.int32)
    found = jax.jit(assign_slots, static_argnums=(1, 2))(jnp.asarray(expert_T), EXPERTS, slots)
    slot_T, token_S, expert_I = map(np.asarray, (found.slot_T, found.token_S, found.expert_I))
    (count,) = np.asarray(found.count)
    assert len(set(slot_T)) == len(expert_T)
    np.testing.assert_array_equal(token_S[slot_T], np.arange(len(expert_T)))
    np.testing.assert_array_equal(expert_I[slot_T // slots], expert_T)
    # The blocks that hold tokens come first, and there are no more than it takes.
    assert set(slot_T // slots) == set(range(count))
    assert count == sum(-(-n // slots) for n in np.bincount(expert_T))
    assert token_S.min() >= 0 and token_S.max() < len(expert_T)


def test_shared_blocks_hold_all_tokens_in_order():
    found = assign_slots(jnp.asarray([1, 0, 1], jnp.int32), EXPERTS, 8, shared_blocks=1)
    np.testing.assert_array_equal(found.token_S[:8], [0, 1, 2, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(found.slot_T, [16, 8, 17])
    np.testing.assert_array_equal(found.count, [3])


@pytest.mark.parametrize("shared_blocks", [0, 1])
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_with_kept_order_each_token_has_its_own_index_in_its_experts_block(tokens, shared_blocks):
    expert_T = jnp.asarray(np.random.default_rng(1).integers(0, EXPERTS, tokens), jnp.int32)
    found = keep_token_order(assign_slots(expert_T, EXPERTS, 8, shared_blocks), 8)
    slot_T = np.asarray(found.slot_T)
    np.testing.assert_array_equal(slot_T % 8, np.arange(tokens))
    np.testing.assert_array_equal(np.asarray(found.expert_I)[slot_T // 8 - shared_blocks], expert_T)
    np.testing.assert_array_equal(np.asarray(found.token_S)[slot_T], np.arange(tokens))


def test_tokens_of_an_expert_keep_their_order():
    found = assign_slots(jnp.asarray([1, 0, 1, 1, 0], jnp.int32), EXPERTS, 8)
    slot_T = np.asarray(found.slot_T)
    assert slot_T[0] < slot_T[2] < slot_T[3]
    assert slot_T[1] < slot_T[4]


def test_one_expert_takes_the_tokens_as_they_come():
    found = assign_slots(jnp.zeros(11, jnp.int32), 1, 8)
    np.testing.assert_array_equal(found.slot_T, np.arange(11))
    np.testing.assert_array_equal(found.count, [2])


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 40, 129])
def test_blocks_suffice_for_every_choice(tokens):
    blocks = count_blocks(tokens, EXPERTS, 8)
    hit = min(tokens, EXPERTS)
    worst = [1] * (hit - 1) + [tokens - hit + 1]  # one token each, the others on the last
    assert sum(-(-n // 8) for n in worst) <= blocks
    even = np.bincount(np.arange(tokens) % EXPERTS)
    assert sum(-(-n // 8) for n in even) <= blocks
