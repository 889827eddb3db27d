"""Which expert each token wants and the slot that it takes there: a launch each.

Plain XLA makes some ten of what is a few additions for each token, and in a decode step a launch
costs more than what it does. These are for so few tokens; prompts are left to XLA.

Letters here: T tokens, E experts, D width; W and L as in `rows`; P tokens, filled up to what a
warpgroup reads at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.routing import Slots, count_blocks
from l4jax.kernels.rows import cut_row, read_share

_load: Any = plgpu.load  # whose parameters differ between versions of jax

_MOST_TOKENS = 256
_MOST_EXPERTS = 32
_THREADS = 128  # of a warpgroup
_COPIED = 4  # int32 that are copied at once, no fewer


def can_choose(x_TD: Array, router_ED: Any) -> bool:
    """Whether `choose_experts` is for these."""
    is_wide = isinstance(router_ED, Array) and router_ED.dtype == x_TD.dtype == jnp.bfloat16
    (tokens, width), experts = x_TD.shape, router_ED.shape[0]
    return is_wide and tokens <= _MOST_TOKENS and experts <= _MOST_EXPERTS and width % _THREADS == 0


@functools.partial(jax.jit, static_argnames="interpret")
def choose_experts(x_TD: Array, router_ED: Array, *, interpret: Any = None) -> tuple[Array, Array]:
    """`reference.route`, of what `can_choose` says."""
    (tokens, width), experts = x_TD.shape, router_ED.shape[0]
    cut = shares, warps, _ = cut_row(width)

    def choose_body(
        x: Any, router: Any, expert: Any, gate: Any, *, found_smem: Any, met: Any
    ) -> None:
        row, share = lax.axis_index("row"), lax.axis_index("share")
        found_WL = read_share(x.at[row, share])
        for at in range(experts):
            product_WL = found_WL * read_share(router.at[at, share])
            found_smem[share, at] = jnp.sum(product_WL, axis=1)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        best, highest = jnp.int32(0), jnp.float32(-jnp.inf)
        for at in range(experts):
            parts = [found_smem[s, at, w] for s in range(shares) for w in range(warps)]
            score = functools.reduce(jnp.add, parts)
            score = score.astype(jnp.bfloat16).astype(jnp.float32)  # as the product is rounded
            best = jnp.where(score > highest, at, best)
            highest = jnp.maximum(score, highest)

        @pl.when(share == 0)
        def _() -> None:
            expert[row] = best
            gate[row] = 1 / (1 + jnp.exp(-highest))

    kernel = plgpu.kernel(
        choose_body,
        out_type=[jax.ShapeDtypeStruct((tokens,), d) for d in (jnp.int32, jnp.float32)],
        grid=(tokens,),
        grid_names=("row",),
        num_threads=shares,
        thread_name="share",
        scratch_types=dict(
            found_smem=plgpu.SMEM((shares, experts, warps), jnp.float32),
            met=plgpu.Barrier(num_arrivals=shares),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )
    expert_T, gate_T = kernel(x_TD.reshape(tokens, *cut), router_ED.reshape(experts, *cut))
    return expert_T, gate_T


def can_assign(tokens: int, experts: int) -> bool:
    """Whether `assign_slots` is for these."""
    return 1 < tokens <= _MOST_TOKENS and tokens % _COPIED == 0 and 1 < experts <= _MOST_EXPERTS


@functools.partial(jax.jit, static_argnames=("experts", "slots", "leading", "interpret"))
def assign_slots(
    expert_T: Array, *, experts: int, slots: int, leading: int, interpret: Any = None
) -> Slots:
    """`routing.assign_slots`, of what `can_assign` says: a thread block for each token."""
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
        slot[mine] = start + rank
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
