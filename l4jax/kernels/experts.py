"""The experts on Hopper GPUs: one that some token wants is read once, where its tokens fit into a
block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from l4jax.kernels import reference
from l4jax.kernels.blocks import permute_columns
from l4jax.kernels.formats import FP8, Weight
from l4jax.kernels.products import (
    FEW,
    Plan,
    Products,
    get_data,
    is_alone,
    multiply_by_xla,
    stack,
)
from l4jax.kernels.reference import Norm
from l4jax.kernels.routing import Slots
from l4jax.kernels.rows import activate_rows

# Tokens up to which the shared expert runs beside the others; in int4 one block, since each block
# widens the weights anew.
_MIXED = 32


@dataclasses.dataclass(frozen=True)
class Experts:
    """Experts of any format, by the products of one kind of device."""

    products: Products

    def run(
        self,
        x_TD: Array,
        norm: Norm | None,
        expert_T: Array,
        gate_up_EcFD: Weight,
        down_EDF: Weight,
        gate_T: Array | None = None,
    ) -> Array:
        """`reference.run_experts`; of tokens that are yet to be scaled, where there are gates."""
        tokens, (experts, _, hidden, _) = x_TD.shape[0], gate_up_EcFD.shape
        up_EOD = stack(gate_up_EcFD, experts, 2 * hidden)
        plans = self._plan(up_EOD, down_EDF, tokens)
        x_TD, norm = self.products.prepare(x_TD, norm, gate_up_EcFD)
        if plans is None or x_TD.dtype != jnp.bfloat16:
            x_TD = self.products.normalize(x_TD, norm)
            x_TD = x_TD if gate_T is None else x_TD * gate_T[:, None].astype(x_TD.dtype)
            return reference.run_experts(x_TD, None, expert_T, gate_up_EcFD, down_EDF)
        if experts == 1 and tokens > FEW and gate_T is None:
            return self._run_one(x_TD, norm, up_EOD, down_EDF)
        where = self.products.assign(expert_T, experts, plans[0])
        y_TD = self._run_slots(x_TD, norm, where, (up_EOD,), (down_EDF,), plans, gate_T)
        return y_TD.astype(x_TD.dtype)

    def mix(
        self,
        x_TD: Array,
        norm: Norm | None,
        expert_T: Array,
        gate_T: Array,
        gate_up_EcFD: Weight,
        down_EDF: Weight,
        shared_gate_up_cFD: Weight,
        shared_down_DF: Weight,
    ) -> Array:
        """`reference.mix_experts`; of few tokens in the launches of one expert: the shared one is
        one more expert, whose blocks come first."""
        tokens, (experts, _, hidden, _) = x_TD.shape[0], gate_up_EcFD.shape
        shared = jax.tree.map(lambda w: w[None], (shared_gate_up_cFD, shared_down_DF))
        ups = tuple(stack(w, w.shape[0], 2 * hidden) for w in (gate_up_EcFD, shared[0]))
        downs = (down_EDF, shared[1])
        plans = self._plan(ups[0], down_EDF, tokens, has_shared=True)
        x_TD, norm = self.products.prepare(x_TD, norm, gate_up_EcFD)
        formats_found = {get_data(w).dtype for w in (*ups, *downs)}
        if (
            plans is None
            or len(formats_found) > 1
            or tokens > (plans[0].slots if jnp.dtype(jnp.int4) in formats_found else _MIXED)
            or x_TD.dtype != jnp.bfloat16
        ):
            shared_TD = self.run(x_TD, norm, jnp.zeros_like(expert_T), *shared)
            return shared_TD + self.run(x_TD, norm, expert_T, gate_up_EcFD, down_EDF, gate_T)
        leading = -(-tokens // plans[0].slots)
        where = self.products.assign(expert_T, experts, plans[0], leading)
        y_TD = self._run_slots(x_TD, norm, where, ups, downs, plans, gate_T, leading=leading)
        return y_TD.astype(x_TD.dtype)

    def _plan(
        self, up_EOD: Weight, down_EDF: Weight, tokens: int, *, has_shared: bool = False
    ) -> tuple[Plan, Plan] | None:
        """How to multiply by both; what comes in is the same to each expert, what is between is
        not."""
        up = self.products.plan(up_EOD, tokens, has_shared=has_shared)
        down = self.products.plan(down_EDF, tokens, has_shared=has_shared, is_held=False)
        return None if up is None or down is None else (up, down)

    def _run_slots(
        self,
        x_TD: Array,
        norm: Norm | None,
        where: Slots,
        ups: tuple[Weight, ...],
        downs: tuple[Weight, ...],
        plans: tuple[Plan, Plan],
        gate_T: Array | None,
        *,
        leading: int = 0,
    ) -> Array:
        """[T, D] float32 of tokens through their experts, counted through the stacks; the leading
        blocks are the shared expert's, which no gate scales, and what it gives is added."""
        parts_PSO, x_scale_T = self.products.multiply_tokens(
            x_TD, norm, ups, where, plans[0], leading
        )
        dtype = get_data(downs[0]).dtype
        if dtype == jnp.int4 and x_scale_T is None and len(x_TD) <= FEW:
            # Not in a kernel of ours: XLA changes the order of their columns in the same launch.
            hidden_SF = _activate(parts_PSO, where, gate_T, leading * plans[0].slots)
            hidden_scale_S = None
        else:
            is_in_order = is_alone(ups) and len(x_TD) == parts_PSO.shape[1]
            hidden = activate_rows(
                parts_PSO,
                x_scale_T,
                gate_T,
                slot_T=None if is_in_order else where.slot_T,
                has_leading=leading > 0,
                is_rounded=dtype == FP8,
                interpret=self.products.interpret,
            )
            hidden_SF, hidden_scale_S = hidden if dtype == FP8 else (hidden, None)
            if dtype == jnp.int4:
                hidden_SF = permute_columns(hidden_SF)
        parts_PSD = self.products.multiply_slots(hidden_SF, downs, where, plans[1], leading)

        def take(slot_T: Array) -> Array:
            # One by one: more of them than a few XLA would add up in a launch of their own.
            first_TD, *others = (part_SD[slot_T].astype(jnp.float32) for part_SD in parts_PSD)
            y_TD = functools.reduce(jnp.add, others, first_TD)
            return y_TD if hidden_scale_S is None else y_TD * hidden_scale_S[slot_T][:, None]

        y_TD = take(where.slot_T)
        return take(jnp.arange(len(x_TD))) + y_TD if leading else y_TD

    def _run_one(self, x_TD: Array, norm: Norm | None, up_EOD: Weight, down_EDF: Weight) -> Array:
        """Many tokens through one expert: the library's products are the fastest."""
        is_rounded, interpret = get_data(down_EDF).dtype == FP8, self.products.interpret
        up = multiply_by_xla(*self.products.round(x_TD, norm, up_EOD), up_EOD)
        hidden = activate_rows(
            up.parts_PSO, up.scale_S, None, up.scale_O, is_rounded=is_rounded, interpret=interpret
        )
        hidden_TF, scale_T = hidden if is_rounded else (hidden, None)
        down = multiply_by_xla(hidden_TF, scale_T, down_EDF)
        return down.finish(len(x_TD)).astype(x_TD.dtype)


def _activate(parts_PSO: Array, where: Slots, gate_T: Array | None, plain: int) -> Array:
    """`activate_rows` in plain XLA and in the order that int4 wants, without scales; no gate scales
    the first `plain` slots."""
    # Taken by a list, and not turned: a transpose XLA would do in a launch of its own.
    order_F = permute_columns(np.arange(parts_PSO.shape[2] // 2))
    factor_S = 1.0
    if gate_T is not None:
        is_plain_S = jnp.arange(parts_PSO.shape[1]) < plain
        factor_S = jnp.where(is_plain_S, 1, gate_T[where.token_S])[:, None]
    gate_SF, up_SF = (
        part_PSF[..., order_F].astype(jnp.float32).sum(axis=0) * factor_S
        for part_PSF in jnp.split(parts_PSO, 2, axis=2)
    )
    return (jax.nn.silu(gate_SF) * up_SF).astype(jnp.bfloat16)
