"""Slots of tokens in expert blocks: each expert's tokens side by side, in whole blocks.

`assign_slots` is the definition, deterministic, in plain XLA without a round trip to the host.
`assign_slots_in_kernel` does it in one launch for a decode step: XLA makes nine launches of a few
additions per token, and a launch costs more than its work. Prefills stay in XLA.

The kernel runs one thread block (a warpgroup) per token, each independent of the others:

    TMA expert_T -> shared memory | count per expert | rank of the own token | store its slot

Shared memory: 4 bytes x the tokens, rounded up to a multiple of 128: 512 bytes for 128 tokens.

Letters: T tokens; P tokens padded to a multiple of a warpgroup's threads; I blocks; S slots of all
blocks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.hopper.heuristics import PAIRWISE_TOKENS, SLOT_EXPERTS, SLOT_TOKENS
from l4jax.kernels.hopper.mosaic import THREADS, load

_COPIED = 4  # int32 per copy, at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotAssignment:
    """Slots of tokens, and experts of blocks."""

    slot_T: Array  # int32 slot of each token
    token_S: Array  # int32 token of each slot; an empty slot has some token, whose result is unused
    expert_I: Array  # int32 expert of each block after the shared ones
    count: Array  # int32 [1]: blocks that hold tokens


def keep_token_order(assignment: SlotAssignment, slots: int) -> SlotAssignment:
    """Give every block all tokens in order: a token's slot is its own index in its expert's block.

    There are no more tokens than slots per block.
    """
    tokens = len(assignment.slot_T)
    assert tokens <= slots
    slot_T = assignment.slot_T // slots * slots + jnp.arange(tokens, dtype=jnp.int32)
    at_S = np.arange(len(assignment.token_S), dtype=np.int32) % slots
    return dataclasses.replace(
        assignment, slot_T=slot_T, token_S=jnp.asarray(np.minimum(at_S, tokens - 1))
    )


def count_blocks(tokens: int, experts: int, slots: int) -> int:
    """Return enough blocks for any choice: each expert leaves at most one block partly empty."""
    return min(tokens, (tokens + min(tokens, experts) * (slots - 1)) // slots)


def assign_slots(
    expert_T: Array, experts: int, slots: int, shared_blocks: int = 0
) -> SlotAssignment:
    """Give each token a slot in a block of its expert, ordered by expert and then by token.

    Args:
        expert_T: int32 expert of each token.
        experts: number of experts.
        slots: per block.
        shared_blocks: blocks before these, of all tokens in order, for a shared expert.
    """
    (tokens,) = expert_T.shape
    if shared_blocks:
        routed, before = assign_slots(expert_T, experts, slots), shared_blocks * slots
        at_S = jnp.minimum(jnp.arange(before, dtype=jnp.int32), tokens - 1)
        token_S = jnp.concatenate([at_S, routed.token_S])
        return SlotAssignment(
            before + routed.slot_T, token_S, routed.expert_I, routed.count + shared_blocks
        )
    blocks = count_blocks(tokens, experts, slots)
    if tokens == 1:
        zero = jnp.zeros(1, jnp.int32)
        return SlotAssignment(zero, jnp.zeros(slots, jnp.int32), expert_T, zero + 1)
    if experts == 1:  # constants without a launch: nothing depends on the tokens
        at_S = np.arange(blocks * slots, dtype=np.int32)
        token_S = np.minimum(at_S, tokens - 1)
        count = np.full(1, -(-tokens // slots), np.int32)
        arrays = (at_S[:tokens], token_S, np.zeros(blocks, np.int32), count)
        return SlotAssignment(*map(jnp.asarray, arrays))
    is_own_TE = expert_T[:, None] == jnp.arange(experts)
    if tokens <= PAIRWISE_TOKENS:
        at_T = jnp.arange(tokens)
        is_before_TT = (expert_T[:, None] == expert_T) & (at_T < at_T[:, None])
        rank_T = is_before_TT.sum(axis=1, dtype=jnp.int32)
    else:
        rank_TE = jnp.cumsum(is_own_TE, axis=0, dtype=jnp.int32) - 1
        rank_T = jnp.take_along_axis(rank_TE, expert_T[:, None], axis=1)[:, 0]
    blocks_E = -(-is_own_TE.sum(axis=0, dtype=jnp.int32) // slots)
    end_E = jnp.cumsum(blocks_E)
    slot_T = (end_E - blocks_E)[expert_T] * slots + rank_T
    token_S = (
        jnp.zeros(blocks * slots, jnp.int32)
        .at[slot_T]
        .set(jnp.arange(tokens, dtype=jnp.int32), unique_indices=True)
    )
    expert_I = (jnp.arange(blocks)[:, None] >= end_E).sum(axis=1, dtype=jnp.int32)
    return SlotAssignment(slot_T, token_S, jnp.minimum(expert_I, experts - 1), end_E[-1:])


def can_assign_in_kernel(tokens: int, experts: int) -> bool:
    """Return whether `assign_slots_in_kernel` takes these sizes."""
    return 1 < tokens <= SLOT_TOKENS and tokens % _COPIED == 0 and 1 < experts <= SLOT_EXPERTS


@functools.partial(
    jax.jit, static_argnames=("experts", "slots", "shared_blocks", "keeps_order", "interpret")
)
def assign_slots_in_kernel(
    expert_T: Array,
    *,
    experts: int,
    slots: int,
    shared_blocks: int,
    keeps_order: bool = False,
    interpret: Any = None,
) -> SlotAssignment:
    """Compute `assign_slots` in one launch, for sizes that `can_assign_in_kernel` accepts.

    With `keeps_order` it computes `keep_token_order` of the result, except for its `token_S`.
    """
    (tokens,) = expert_T.shape
    blocks, before = count_blocks(tokens, experts, slots), shared_blocks * slots
    padded = -(-tokens // THREADS) * THREADS
    layout = plgpu.Layout.WG_STRIDED((padded,), padded // THREADS)

    def slot_assignment_kernel(
        expert: Any,
        slot: Any,
        token: Any,
        block_expert: Any,
        count: Any,
        *,
        expert_smem: Any,
        full: Any,
    ) -> None:
        t = lax.axis_index("token")
        plgpu.copy_gmem_to_smem(expert, expert_smem.at[pl.ds(0, tokens)], full)
        plgpu.barrier_wait(full)
        expert_P = load(expert_smem, layout=layout, optimized=False)
        at_P = plgpu.broadcasted_iota(jnp.int32, (padded,), 0, layout=layout)

        def count_where(mask_P: Array) -> Array:
            return jnp.sum(jnp.where(mask_P, 1, 0))

        own = expert_smem[t]
        rank = count_where((expert_P == own) & (at_P < t))
        # Blocks of the experts before this token's, blocks of all experts, tokens of this expert.
        first, used, own_tokens = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for e in range(experts):
            expert_tokens = count_where((expert_P == e) & (at_P < tokens))
            needed = lax.div(expert_tokens + (slots - 1), jnp.int32(slots))
            first = jnp.where(e < own, first + needed, first)
            own_tokens = jnp.where(e == own, expert_tokens, own_tokens)
            used += needed
        start = before + first * slots
        slot[t] = start + (t if keeps_order else rank)
        token[start + rank] = t

        @pl.when(lax.rem(rank, slots) == 0)
        def _() -> None:
            block_expert[first + lax.div(rank, slots)] = own

        @pl.when(rank == own_tokens - 1)  # the expert's last token fills the rest of its block
        def _() -> None:
            @pl.loop(own_tokens, lax.div(own_tokens + (slots - 1), slots) * slots)
            def _(at: Array) -> None:
                token[start + at] = 0

        @pl.when(used + t < blocks)  # an unused block
        def _() -> None:
            block_expert[used + t] = experts - 1

            @pl.loop(0, slots)
            def _(at: Array) -> None:
                token[before + (used + t) * slots + at] = 0

        for at in range(0, before, tokens):

            @pl.when(at + t < before)
            def _(at: int = at) -> None:
                token[at + t] = jnp.minimum(at + t, tokens - 1)

        @pl.when(t == 0)
        def _() -> None:
            count[0] = shared_blocks + used

    sizes = (tokens, before + blocks * slots, blocks, 1)
    kernel = plgpu.kernel(
        slot_assignment_kernel,
        out_type=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes],
        grid=(tokens,),
        grid_names=("token",),
        scratch_types=dict(expert_smem=plgpu.SMEM((padded,), jnp.int32), full=plgpu.Barrier()),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return SlotAssignment(*kernel(expert_T))
