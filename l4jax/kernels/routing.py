"""Which slots the tokens take: each expert's tokens side by side, in whole blocks. Plain XLA, no
round trip to the host, and the same for the same tokens always."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_COMPARED = 1024  # tokens up to which each is compared with each: fewer launches than a prefix sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where tokens go. Letters as in `blocks`: I blocks, and S slots of all of them."""

    slot_T: Array  # int32: of each token
    token_S: Array  # int32: of each slot; an empty one names some token, whose result nobody takes
    expert_I: Array  # int32: of each block behind the leading ones
    count: Array  # int32 [1]: blocks that hold tokens


def keep_order(where: Slots, slots: int) -> Slots:
    """The same for no more tokens than slots of a block, where in each block all stand in order: a
    token's slot is the one that it has in the block of its expert."""
    tokens = len(where.slot_T)
    assert tokens <= slots
    slot_T = where.slot_T // slots * slots + jnp.arange(tokens, dtype=jnp.int32)
    at_S = np.arange(len(where.token_S), dtype=np.int32) % slots
    return dataclasses.replace(
        where, slot_T=slot_T, token_S=jnp.asarray(np.minimum(at_S, tokens - 1))
    )


def count_blocks(tokens: int, experts: int, slots: int) -> int:
    """Blocks that always suffice: each expert leaves less than one of its own unfilled."""
    return min(tokens, (tokens + min(tokens, experts) * (slots - 1)) // slots)


def assign_slots(expert_T: Array, experts: int, slots: int, leading: int = 0) -> Slots:
    """Give each token a slot in a block of its expert, in order of experts and then of tokens.

    Args:
        expert_T: int32, what each token wants.
        experts: how many there are.
        slots: of a block.
        leading: blocks before those, of all tokens in order: for an expert that all share.
    """
    if leading:
        mine, tokens, before = (
            assign_slots(expert_T, experts, slots),
            len(expert_T),
            leading * slots,
        )
        at_S = jnp.minimum(jnp.arange(before, dtype=jnp.int32), tokens - 1)
        token_S = jnp.concatenate([at_S, mine.token_S])
        return Slots(before + mine.slot_T, token_S, mine.expert_I, mine.count + leading)
    (tokens,) = expert_T.shape
    blocks = count_blocks(tokens, experts, slots)
    if tokens == 1:
        none = jnp.zeros(1, jnp.int32)
        return Slots(none, jnp.zeros(slots, jnp.int32), expert_T, none + 1)
    if experts == 1:  # nothing depends on the tokens: constants, and no launch
        at_S = np.arange(blocks * slots, dtype=np.int32)
        token_S = np.minimum(at_S, tokens - 1)
        full = np.full(1, -(-tokens // slots), np.int32)
        parts = (at_S[:tokens], token_S, np.zeros(blocks, np.int32), full)
        return Slots(*map(jnp.asarray, parts))
    is_mine_TE = expert_T[:, None] == jnp.arange(experts)
    if tokens <= _COMPARED:
        at_T = jnp.arange(tokens)
        is_before_TT = (expert_T[:, None] == expert_T) & (at_T < at_T[:, None])
        rank_T = is_before_TT.sum(axis=1, dtype=jnp.int32)
    else:
        rank_TE = jnp.cumsum(is_mine_TE, axis=0, dtype=jnp.int32) - 1
        rank_T = jnp.take_along_axis(rank_TE, expert_T[:, None], axis=1)[:, 0]
    blocks_E = -(-is_mine_TE.sum(axis=0, dtype=jnp.int32) // slots)
    end_E = jnp.cumsum(blocks_E)
    slot_T = (end_E - blocks_E)[expert_T] * slots + rank_T
    token_S = (
        jnp.zeros(blocks * slots, jnp.int32)
        .at[slot_T]
        .set(jnp.arange(tokens, dtype=jnp.int32), unique_indices=True)
    )
    expert_I = (jnp.arange(blocks)[:, None] >= end_E).sum(axis=1, dtype=jnp.int32)
    return Slots(slot_T, token_S, jnp.minimum(expert_I, experts - 1), end_E[-1:])
