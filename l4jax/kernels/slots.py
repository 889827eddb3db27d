"""The slot that each token takes in a block of its expert, in one launch.

Plain XLA makes nine of what is a few additions for each token, and in a decode step a launch costs
more than what it does. This is for so few tokens; prompts are left to XLA.

Letters here: T tokens; P the same, filled up to what a warpgroup reads at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.routing import Slots, count_blocks

_load: Any = plgpu.load  # whose parameters differ between versions of jax

_MOST_TOKENS = 256
_MOST_EXPERTS = 32
_THREADS = 128  # of a warpgroup
_COPIED = 4  # int32 that are copied at once, no fewer


def can_assign(tokens: int, experts: int) -> bool:
    """Whether `assign_at_once` is for these."""
    return 1 < tokens <= _MOST_TOKENS and tokens % _COPIED == 0 and 1 < experts <= _MOST_EXPERTS


@functools.partial(
    jax.jit, static_argnames=("experts", "slots", "leading", "keeps_order", "interpret")
)
def assign_at_once(
    expert_T: Array,
    *,
    experts: int,
    slots: int,
    leading: int,
    keeps_order: bool = False,
    interpret: Any = None,
) -> Slots:
    """`routing.assign_slots`, of what `can_assign` says: a thread block for each token. Also
    `routing.keep_order` of that, but for the tokens of the slots."""
    (tokens,) = expert_T.shape
    blocks, before = count_blocks(tokens, experts, slots), leading * slots
    many = -(-tokens // _THREADS) * _THREADS
    layout = plgpu.Layout.WG_STRIDED((many,), many // _THREADS)

    def assign_body(
        expert: Any,
        slot: Any,
        token: Any,
        owner: Any,
        count: Any,
        *,
        expert_smem: Any,
        full: Any,
    ) -> None:
        mine = lax.axis_index("token")
        plgpu.copy_gmem_to_smem(expert, expert_smem.at[pl.ds(0, tokens)], full)
        plgpu.barrier_wait(full)
        expert_P = _load(expert_smem, layout=layout, optimized=False)
        at_P = plgpu.broadcasted_iota(jnp.int32, (many,), 0, layout=layout)

        def count_where(is_so_P: Array) -> Array:
            return jnp.sum(jnp.where(is_so_P, 1, 0))

        wanted = expert_smem[mine]
        rank = count_where((expert_P == wanted) & (at_P < mine))
        # Blocks of the experts before this token's, and of all.
        first, used, of_mine = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for at in range(experts):
            found = count_where((expert_P == at) & (at_P < tokens))
            needed = lax.div(found + (slots - 1), jnp.int32(slots))
            first = jnp.where(at < wanted, first + needed, first)
            of_mine = jnp.where(at == wanted, found, of_mine)
            used += needed
        start = before + first * slots
        slot[mine] = start + (mine if keeps_order else rank)
        token[start + rank] = mine

        @pl.when(lax.rem(rank, slots) == 0)
        def _() -> None:
            owner[first + lax.div(rank, slots)] = wanted

        @pl.when(rank == of_mine - 1)  # what its expert's last token leaves
        def _() -> None:
            @pl.loop(of_mine, lax.div(of_mine + (slots - 1), slots) * slots)
            def _(at: Array) -> None:
                token[start + at] = 0

        @pl.when(used + mine < blocks)  # a block that nobody uses
        def _() -> None:
            owner[used + mine] = experts - 1

            @pl.loop(0, slots)
            def _(at: Array) -> None:
                token[before + (used + mine) * slots + at] = 0

        for at in range(0, before, tokens):

            @pl.when(at + mine < before)
            def _(at: int = at) -> None:
                token[at + mine] = jnp.minimum(at + mine, tokens - 1)

        @pl.when(mine == 0)
        def _() -> None:
            count[0] = leading + used

    sizes = (tokens, before + blocks * slots, blocks, 1)
    kernel = plgpu.kernel(
        assign_body,
        out_type=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes],
        grid=(tokens,),
        grid_names=("token",),
        scratch_types=dict(expert_smem=plgpu.SMEM((many,), jnp.int32), full=plgpu.Barrier()),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return Slots(*kernel(expert_T))
