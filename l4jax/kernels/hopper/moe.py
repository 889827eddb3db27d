"""Mixture of experts: slots, a grouped matmul, the activation, a grouped matmul, the gather.

An expert with tokens is read once where its tokens fit into a block; an expert without tokens is
never read. Up to 32 tokens the shared expert runs in the same launches: its blocks come first.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from l4jax.kernels import reference
from l4jax.kernels.formats import FP8, Weight
from l4jax.kernels.hopper.elementwise import activate_rows
from l4jax.kernels.hopper.heuristics import (
    MEMORY_BOUND_TOKENS,
    SHARED_EXPERT_TOKENS,
    can_run_rows,
)
from l4jax.kernels.hopper.int4 import permute_columns
from l4jax.kernels.hopper.linear import (
    Linear,
    MatmulConfig,
    get_data,
    is_single,
    multiply_by_library,
    stack,
)
from l4jax.kernels.hopper.slot_assignment import SlotAssignment
from l4jax.kernels.reference import Norm


@dataclasses.dataclass(frozen=True)
class Experts:
    """Experts of any format, on the matmuls of one kind of device."""

    linear: Linear

    def run(
        self,
        x_TD: Array,
        norm: Norm | None,
        expert_T: Array,
        gate_up_EcFD: Weight,
        down_EDF: Weight,
        gate_T: Array | None = None,
    ) -> Array:
        """Compute `reference.run_experts`; gates, where given, scale the tokens."""
        tokens, (experts, _, hidden, _) = x_TD.shape[0], gate_up_EcFD.shape
        up_EOD = stack(gate_up_EcFD, experts, 2 * hidden)
        configs = self._configure(up_EOD, down_EDF, tokens)
        x_TD, norm = self.linear.prepare(x_TD, norm, gate_up_EcFD)
        if configs is None or x_TD.dtype != jnp.bfloat16:
            x_TD = self.linear.normalize(x_TD, norm)
            x_TD = x_TD if gate_T is None else x_TD * gate_T[:, None].astype(x_TD.dtype)
            return reference.run_experts(x_TD, None, expert_T, gate_up_EcFD, down_EDF)
        if experts == 1 and tokens > MEMORY_BOUND_TOKENS and gate_T is None:
            return self._run_dense(x_TD, norm, up_EOD, down_EDF)
        assignment = self.linear.assign(expert_T, experts, configs[0])
        y_TD = self._run_slots(x_TD, norm, assignment, (up_EOD,), (down_EDF,), configs, gate_T)
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
        """Compute `reference.mix_experts`.

        With few tokens the shared expert is one more expert of the same launches, whose blocks
        come first.
        """
        tokens, (experts, _, hidden, _) = x_TD.shape[0], gate_up_EcFD.shape
        shared = jax.tree.map(lambda w: w[None], (shared_gate_up_cFD, shared_down_DF))
        ups = tuple(stack(w, w.shape[0], 2 * hidden) for w in (gate_up_EcFD, shared[0]))
        downs = (down_EDF, shared[1])
        configs = self._configure(ups[0], down_EDF, tokens, has_shared=True)
        x_TD, norm = self.linear.prepare(x_TD, norm, gate_up_EcFD)
        dtypes = {get_data(w).dtype for w in (*ups, *downs)}
        if (
            configs is None
            or len(dtypes) > 1
            or tokens
            > (configs[0].slots if jnp.dtype(jnp.int4) in dtypes else SHARED_EXPERT_TOKENS)
            or x_TD.dtype != jnp.bfloat16
        ):
            shared_TD = self.run(x_TD, norm, jnp.zeros_like(expert_T), *shared)
            return shared_TD + self.run(x_TD, norm, expert_T, gate_up_EcFD, down_EDF, gate_T)
        shared_blocks = -(-tokens // configs[0].slots)
        assignment = self.linear.assign(expert_T, experts, configs[0], shared_blocks)
        y_TD = self._run_slots(
            x_TD, norm, assignment, ups, downs, configs, gate_T, shared_blocks=shared_blocks
        )
        return y_TD.astype(x_TD.dtype)

    def _configure(
        self, up_EOD: Weight, down_EDF: Weight, tokens: int, *, has_shared: bool = False
    ) -> tuple[MatmulConfig, MatmulConfig] | None:
        """Configure both matmuls: all experts see the same inputs, but not the same hidden rows.

        A device's share of the hidden size may be too narrow for `activate_rows`: return None.
        """
        if not can_run_rows(down_EDF.shape[-1]):
            return None
        up = self.linear.configure(up_EOD, tokens, has_shared=has_shared)
        down = self.linear.configure(down_EDF, tokens, has_shared=has_shared, can_be_resident=False)
        return None if up is None or down is None else (up, down)

    def _run_slots(
        self,
        x_TD: Array,
        norm: Norm | None,
        assignment: SlotAssignment,
        ups: tuple[Weight, ...],
        downs: tuple[Weight, ...],
        configs: tuple[MatmulConfig, MatmulConfig],
        gate_T: Array | None,
        *,
        shared_blocks: int = 0,
    ) -> Array:
        """Run tokens through their experts, counted through the stacks: [T, D] float32.

        The shared blocks belong to the shared expert: no gate scales them, and their output is
        added.
        """
        parts_PSO, x_scale_T = self.linear.multiply_tokens(
            x_TD, norm, ups, assignment, configs[0], shared_blocks
        )
        dtype = get_data(downs[0]).dtype
        if dtype == jnp.int4 and x_scale_T is None and len(x_TD) <= MEMORY_BOUND_TOKENS:
            # In XLA and not in our kernel: XLA permutes the columns in the same launch.
            hidden_SF = _activate_permuted(
                parts_PSO, assignment, gate_T, shared_blocks * configs[0].slots
            )
            hidden_scale_S = None
        else:
            is_in_order = is_single(ups) and len(x_TD) == parts_PSO.shape[1]
            hidden = activate_rows(
                parts_PSO,
                x_scale_T,
                gate_T,
                slot_T=None if is_in_order else assignment.slot_T,
                has_shared=shared_blocks > 0,
                is_quantized=dtype == FP8,
                interpret=self.linear.interpret,
            )
            hidden_SF, hidden_scale_S = hidden if dtype == FP8 else (hidden, None)
            if dtype == jnp.int4:
                hidden_SF = permute_columns(hidden_SF)
        parts_PSD = self.linear.multiply_slots(
            hidden_SF, downs, assignment, configs[1], shared_blocks
        )

        def gather(slot_T: Array) -> Array:
            # One by one: XLA would sum more than a few of them in a launch of their own.
            first_TD, *others = (part_SD[slot_T].astype(jnp.float32) for part_SD in parts_PSD)
            y_TD = functools.reduce(jnp.add, others, first_TD)
            return y_TD if hidden_scale_S is None else y_TD * hidden_scale_S[slot_T][:, None]

        y_TD = gather(assignment.slot_T)
        return gather(jnp.arange(len(x_TD))) + y_TD if shared_blocks else y_TD

    def _run_dense(self, x_TD: Array, norm: Norm | None, up_EOD: Weight, down_EDF: Weight) -> Array:
        """Run many tokens through one expert: the library's matmuls are the fastest."""
        is_quantized, interpret = get_data(down_EDF).dtype == FP8, self.linear.interpret
        up = multiply_by_library(*self.linear.quantize(x_TD, norm, up_EOD), up_EOD)
        hidden = activate_rows(
            up.parts_PSO,
            up.scale_S,
            None,
            up.scale_O,
            is_quantized=is_quantized,
            interpret=interpret,
        )
        hidden_TF, scale_T = hidden if is_quantized else (hidden, None)
        down = multiply_by_library(hidden_TF, scale_T, down_EDF)
        return down.sum(len(x_TD)).astype(x_TD.dtype)


def _activate_permuted(
    parts_PSO: Array, assignment: SlotAssignment, gate_T: Array | None, shared_slots: int
) -> Array:
    """Compute `activate_rows` in plain XLA, with int4's permuted columns and without scales.

    No gate scales the first `shared_slots` slots.
    """
    # A gather by an index list: XLA would do a transpose in a launch of its own.
    order_F = permute_columns(np.arange(parts_PSO.shape[2] // 2))
    factor_S = 1.0
    if gate_T is not None:
        is_shared_S = jnp.arange(parts_PSO.shape[1]) < shared_slots
        factor_S = jnp.where(is_shared_S, 1, gate_T[assignment.token_S])[:, None]
    gate_SF, up_SF = (
        part_PSF[..., order_F].astype(jnp.float32).sum(axis=0) * factor_S
        for part_PSF in jnp.split(parts_PSO, 2, axis=2)
    )
    return (jax.nn.silu(gate_SF) * up_SF).astype(jnp.bfloat16)
