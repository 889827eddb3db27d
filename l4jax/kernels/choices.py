"""Which expert each token wants and the slot that it takes there: a launch each.

Plain XLA makes some ten of what is a few additions for each token, and in a decode step a launch
costs more than what it does. These are for so few tokens; prompts are left to XLA.

Letters here: T tokens, E experts, D width, I blocks, S slots of all of them; P a power of two that
holds so many, which Triton wants of every array.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from l4jax.kernels.routing import Slots, count_blocks

MOST_TOKENS = 256  # of which all slots fit into the registers of one thread block
_LEAST_COLUMNS, _MOST_COLUMNS = 128, 1024  # of a row that are read at once


@functools.partial(jax.jit, static_argnames="is_interpreted")
def choose_experts(
    x_TD: Array, router_ED: Array, *, is_interpreted: bool = False
) -> tuple[Array, Array]:
    """`reference.route`, of shapes that `can_choose`."""
    (tokens, width), experts = x_TD.shape, router_ED.shape[0]
    columns = _find_columns(width)

    def choose_body(x: Any, router: Any, expert: Any, gate: Any) -> None:
        token, at_E = pl.program_id(0), jnp.arange(experts)
        score_E = jnp.zeros(experts, jnp.float32)
        for first in range(0, width, columns):
            here = pl.ds(first, columns)
            found = plt.load(x.at[token, here]).astype(jnp.float32)
            score_E += jnp.sum(plt.load(router.at[:, here]).astype(jnp.float32) * found, axis=1)
        score_E = score_E.astype(jnp.bfloat16).astype(jnp.float32)  # as the product is rounded
        highest = jnp.max(score_E)
        # The first of equals; of a token that is not a number some expert.
        first = jnp.min(jnp.where(score_E == highest, at_E, experts - 1))
        expert[token] = first.astype(jnp.int32)
        gate[token] = 1 / (1 + jnp.exp(-highest))

    one_each = [jax.ShapeDtypeStruct((tokens,), dtype) for dtype in (jnp.int32, jnp.float32)]
    return _launch(choose_body, one_each, (tokens,), is_interpreted)(x_TD, router_ED)


def can_choose(x_TD: Array, router_ED: Any) -> bool:
    """Whether `choose_experts` is for these."""
    (tokens, width), experts = x_TD.shape, router_ED.shape[0]
    is_wide = isinstance(router_ED, Array) and router_ED.dtype == x_TD.dtype == jnp.bfloat16
    return (
        is_wide
        and tokens <= MOST_TOKENS
        and experts == pl.next_power_of_2(experts)
        and _find_columns(width) >= _LEAST_COLUMNS
    )


@functools.partial(jax.jit, static_argnames=("experts", "slots", "leading", "is_interpreted"))
def assign_slots(
    expert_T: Array, *, experts: int, slots: int, leading: int, is_interpreted: bool = False
) -> Slots:
    """`routing.assign_slots`, of no more than `MOST_TOKENS`."""
    (tokens,) = expert_T.shape
    blocks, before = count_blocks(tokens, experts, slots), leading * slots
    many_T, many_E, many_I, many_S = map(
        pl.next_power_of_2, (tokens, experts, blocks, blocks * slots)
    )

    def assign_body(expert: Any, slot: Any, token: Any, owner: Any, count: Any) -> None:
        at_P, expert_P = jnp.arange(many_T), jnp.arange(many_E)
        token_P = jnp.minimum(at_P, tokens - 1)  # the last one again and again, which counts once
        is_mine_PE = plt.load(expert.at[token_P])[:, None] == expert_P[None]
        one_PE = (is_mine_PE & (at_P < tokens)[:, None]).astype(jnp.int32)
        count_E = jnp.sum(one_PE, axis=0)
        blocks_E = lax.div(count_E + (slots - 1), jnp.int32(slots))
        end_E = jnp.cumsum(blocks_E)
        start_E = before + (end_E - blocks_E) * slots
        # The tokens of its expert before each, behind where this one's slots begin.
        before_PE = jnp.cumsum(one_PE, axis=0) - 1 + start_E[None]
        slot_P = jnp.sum(jnp.where(is_mine_PE, before_PE, 0), axis=1)
        plt.store(slot.at[token_P], slot_P)
        plt.store(token.at[slot_P], token_P)
        # The other slots name a token, too.
        at_P = before + jnp.arange(many_S)
        within_PE = at_P[:, None] - start_E[None]
        is_taken_PE = (within_PE >= 0) & (within_PE < count_E[None])
        is_taken_P = jnp.sum(is_taken_PE.astype(jnp.int32), axis=1) > 0
        is_empty_P = (at_P < before + blocks * slots) & ~is_taken_P
        plt.store(token.at[at_P], jnp.zeros(many_S, jnp.int32), mask=is_empty_P)
        if before:
            at_P = jnp.minimum(jnp.arange(pl.next_power_of_2(before)), before - 1)
            plt.store(token.at[at_P], jnp.minimum(at_P, tokens - 1))
        at_P = jnp.arange(many_I)
        owner_P = jnp.sum((end_E[None] <= at_P[:, None]).astype(jnp.int32), axis=1)
        plt.store(owner.at[at_P], jnp.minimum(owner_P, experts - 1), mask=at_P < blocks)
        count[0] = leading + jnp.sum(blocks_E)

    sizes = (tokens, before + blocks * slots, blocks, 1)
    out_types = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes]
    return Slots(*_launch(assign_body, out_types, (), is_interpreted)(expert_T))


def _find_columns(width: int) -> int:
    """The largest power of two that divides a row, and no more than is read at once."""
    return min(width & -width, _MOST_COLUMNS)


def _launch(body: Any, out_types: Any, grid: tuple[int, ...], is_interpreted: bool) -> Any:
    return pl.pallas_call(
        body,
        out_shape=out_types,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=8),
        interpret=is_interpreted,
    )
