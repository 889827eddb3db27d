"""Accelerations for Hopper GPUs (compute capability 9.0), with the signatures of `reference`.

What a kernel here cannot run, a strange shape or a format, goes to the definition or to
`portable`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from l4jax.kernels import formats, pages, portable, reference
from l4jax.kernels.blocks import GROUP, multiply_blocks, multiply_held, permute_columns
from l4jax.kernels.formats import FP8, Quantized, Weight
from l4jax.kernels.routing import Slots, assign_slots, count_blocks, keep_order
from l4jax.kernels.rows import activate_rows, normalize_rows, round_rows
from l4jax.kernels.slots import assign_at_once, can_assign
from l4jax.kernels.tiles import Tiles, choose_slots, choose_tiles

# Tokens up to which the shared expert runs beside the others; in int4 one block, since each block
# widens the weights anew.
_MIXED = 32
_FEW = 128  # tokens up to which a dense product is bound by reading its weights
_TALL = 8  # rows to a column of a bfloat16 matrix, as of the head, that is better read by us
_THREADS = 128  # of a warpgroup: what a row is a multiple of
_LAST = (((1,), (1,)), ((), ()))  # both sides are summed over their last axis


@dataclasses.dataclass(frozen=True)
class Hopper:
    """The kernels on one kind of device.

    Attributes:
        sms: multiprocessors of the device.
        interpret: what `pallas` interprets kernels with, where there is no such device.
        held: tokens up to which products in fp8 round them themselves, at most 8.
        is_paired: see `pages.attend`.
    """

    sms: int
    interpret: Any = None
    held: int = 0
    is_paired: bool = False

    def normalize(self, x_TD: Array, scale_D: Array, eps: float) -> Array:
        """`reference.normalize`, in one launch where XLA makes two."""
        if x_TD.shape[1] % _THREADS or x_TD.dtype != jnp.bfloat16:
            return reference.normalize(x_TD, scale_D, eps)
        return normalize_rows(x_TD, scale_D, eps=eps, interpret=self.interpret)

    def multiply(self, subscripts: str, x: Array, weight: Weight) -> Array:
        """`formats.multiply`."""
        ins, out = subscripts.split("->")
        x_axes, w_axes = ins.split(",")
        x_left = "".join(letter for letter in x_axes if letter in out)
        w_left = "".join(letter for letter in w_axes if letter in out)
        summed = w_axes[len(w_left) :]
        if (
            isinstance(weight, formats.Adapted)
            or (x_axes, w_axes) != (x_left + summed, w_left + summed)
            or x.dtype != jnp.bfloat16
        ):
            return formats.multiply(subscripts, x, weight)
        tokens = math.prod(x.shape[: len(x_left)])
        rows = math.prod(weight.shape[: len(w_left)])
        x_TU = x.reshape(tokens, -1)
        is_tall = rows >= _TALL * x_TU.shape[1] and tokens <= _FEW
        if isinstance(weight, Quantized) or is_tall:
            y_TO = self._multiply_dense(x_TU, _reshape(weight, 1, rows))
        else:
            # In two axes each: of more that are summed over XLA writes the whole weight down anew,
            # transposed, in each step.
            y_TO = lax.dot_general(x_TU, weight.reshape(rows, -1), _LAST)
        shape = (*x.shape[: len(x_left)], *weight.shape[: len(w_left)])
        order = [(x_left + w_left).index(letter) for letter in out]
        return y_TO.reshape(shape).transpose(order)

    def _multiply_dense(self, x_TU: Array, weight_EOU: Weight) -> Array:
        """[T, O] of tokens and one matrix."""
        tokens, dtype = x_TU.shape[0], _get_data(weight_EOU).dtype
        plan = self._plan(weight_EOU, tokens)
        if plan is None or tokens > _FEW:
            x_TU, x_scale_T = self._round(x_TU, dtype)
            return _multiply_by_xla(x_TU, x_scale_T, weight_EOU)
        where = self._assign(jnp.zeros(tokens, jnp.int32), 1, plan)
        parts_PSO, x_scale_T = self._multiply_tokens(x_TU, (weight_EOU,), where, plan)
        y_TO = parts_PSO[:, :tokens].astype(jnp.float32).sum(axis=0)
        if x_scale_T is not None:
            y_TO = y_TO * x_scale_T[:tokens, None]
        return y_TO.astype(x_TU.dtype)

    def run_experts(
        self, x_TD: Array, expert_T: Array, gate_up_EcFD: Weight, down_EDF: Weight
    ) -> Array:
        """`reference.run_experts`, of the experts that some token wants, each read once where its
        tokens fit into a block."""
        return self._run_experts(x_TD, expert_T, None, gate_up_EcFD, down_EDF)

    def _run_experts(
        self,
        x_TD: Array,
        expert_T: Array,
        gate_T: Array | None,
        gate_up_EcFD: Weight,
        down_EDF: Weight,
    ) -> Array:
        """The same of tokens that are yet to be scaled by their gates, where they have any."""
        tokens, (experts, _, hidden, _) = x_TD.shape[0], gate_up_EcFD.shape
        up_EOD = _reshape(gate_up_EcFD, experts, 2 * hidden)
        plans = self._plan_both(up_EOD, down_EDF, tokens)
        if plans is None or x_TD.dtype != jnp.bfloat16:
            x_TD = x_TD if gate_T is None else x_TD * gate_T[:, None].astype(x_TD.dtype)
            return reference.run_experts(x_TD, expert_T, gate_up_EcFD, down_EDF)
        if experts == 1 and tokens > _FEW and gate_T is None:
            return self._run_one_expert(x_TD, up_EOD, down_EDF)
        where = self._assign(expert_T, experts, plans[0])
        y_TD = self._run_slots(x_TD, where, (up_EOD,), (down_EDF,), plans, gate_T)
        return y_TD.astype(x_TD.dtype)

    def mix_experts(
        self,
        x_TD: Array,
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
        ups = tuple(_reshape(w, w.shape[0], 2 * hidden) for w in (gate_up_EcFD, shared[0]))
        downs = (down_EDF, shared[1])
        plans = self._plan_both(ups[0], down_EDF, tokens, has_shared=True)
        formats_found = {_get_data(w).dtype for w in (*ups, *downs)}
        if (
            plans is None
            or len(formats_found) > 1
            or tokens > (plans[0].slots if jnp.dtype(jnp.int4) in formats_found else _MIXED)
            or x_TD.dtype != jnp.bfloat16
        ):
            alone_T = jnp.zeros_like(expert_T)
            return self.run_experts(x_TD, alone_T, *shared) + self._run_experts(
                x_TD, expert_T, gate_T, gate_up_EcFD, down_EDF
            )
        leading = -(-tokens // plans[0].slots)
        where = self._assign(expert_T, experts, plans[0], leading)
        y_TD = self._run_slots(x_TD, where, ups, downs, plans, gate_T, leading=leading)
        return y_TD.astype(x_TD.dtype)

    def _run_slots(
        self,
        x_TD: Array,
        where: Slots,
        ups: tuple[Weight, ...],
        downs: tuple[Weight, ...],
        plans: "tuple[Plan, Plan]",
        gate_T: Array | None = None,
        *,
        leading: int = 0,
    ) -> Array:
        """[T, D] float32 of tokens through their experts, counted through the stacks; the leading
        blocks are the shared expert's, which no gate scales, and what it gives is added."""
        parts_PSO, x_scale_T = self._multiply_tokens(x_TD, ups, where, plans[0], leading)
        dtype = _get_data(downs[0]).dtype
        if dtype == jnp.int4 and x_scale_T is None and len(x_TD) <= _FEW:
            # Not in a kernel of ours: XLA changes the order of their columns in the same launch.
            hidden_SF = _activate(parts_PSO, where, gate_T, leading * plans[0].slots)
            hidden_scale_S = None
        else:
            is_in_order = _is_alone(ups) and len(x_TD) == parts_PSO.shape[1]
            hidden = activate_rows(
                parts_PSO,
                x_scale_T,
                gate_T,
                slot_T=None if is_in_order else where.slot_T,
                has_leading=leading > 0,
                is_rounded=dtype == FP8,
                interpret=self.interpret,
            )
            hidden_SF, hidden_scale_S = hidden if dtype == FP8 else (hidden, None)
            if dtype == jnp.int4:
                hidden_SF = permute_columns(hidden_SF)
        parts_PSD = self._multiply_slots(hidden_SF, downs, where, plans[1], leading)

        def take(slot_T: Array) -> Array:
            # One by one: more of them than a few XLA would add up in a launch of their own.
            first_TD, *others = (part_SD[slot_T].astype(jnp.float32) for part_SD in parts_PSD)
            y_TD = functools.reduce(jnp.add, others, first_TD)
            return y_TD if hidden_scale_S is None else y_TD * hidden_scale_S[slot_T][:, None]

        y_TD = take(where.slot_T)
        return take(jnp.arange(len(x_TD))) + y_TD if leading else y_TD

    def _run_one_expert(self, x_TD: Array, up_EOD: Weight, down_EDF: Weight) -> Array:
        """The same for many tokens and one expert: the library's products are the fastest."""
        dtype = _get_data(up_EOD).dtype
        if dtype != FP8:
            y_TO = _multiply_by_xla(x_TD, None, up_EOD)
            hidden_TF = activate_rows(y_TO[None], is_rounded=False, interpret=self.interpret)
            return _multiply_by_xla(hidden_TF, None, down_EDF)
        x_TD, x_scale_T = self._round(x_TD, dtype)
        y_TO = lax.dot_general(
            x_TD, _get_data(up_EOD)[0], _LAST, preferred_element_type=jnp.bfloat16
        )
        hidden_TF, scale_T = activate_rows(
            y_TO[None],
            x_scale_T,
            scale_O=_get_scale(up_EOD)[0],
            is_rounded=True,
            interpret=self.interpret,
        )
        return _multiply_by_xla(hidden_TF, scale_T, down_EDF)

    def _assign(self, expert_T: Array, experts: int, plan: "Plan", leading: int = 0) -> Slots:
        """`assign_slots`, of few tokens in one launch."""
        if can_assign(len(expert_T), experts):
            return assign_at_once(
                expert_T,
                experts=experts,
                slots=plan.slots,
                leading=leading,
                keeps_order=plan.tiles.is_held,
                interpret=self.interpret,
            )
        where = assign_slots(expert_T, experts, plan.slots, leading)
        if plan.tiles.is_held:
            where = keep_order(where, plan.slots)
        # Written down: XLA would work them out anew for each element that is read by them.
        return lax.optimization_barrier(where) if experts > 1 else where

    def _plan_both(
        self, up_EOD: Weight, down_EDF: Weight, tokens: int, *, has_shared: bool = False
    ) -> "tuple[Plan, Plan] | None":
        """How to run experts; what comes in is the same to each of them, what is between is not."""
        up = self._plan(up_EOD, tokens, has_shared=has_shared)
        down = self._plan(down_EDF, tokens, has_shared=has_shared, is_held=False)
        return None if up is None or down is None else (up, down)

    def _plan(
        self, weight_EOU: Weight, tokens: int, *, has_shared: bool = False, is_held: bool = True
    ) -> "Plan | None":
        """How to multiply tokens by the matrices of experts, and by one that all share; None where
        the kernel cannot. Few tokens are held, unless they are not the same to each expert."""
        data, (experts, rows, columns) = _get_data(weight_EOU), weight_EOU.shape
        if data.dtype == jnp.int4 and columns != _get_scale(weight_EOU).shape[-1] * GROUP:
            return None
        slots = choose_slots(tokens, experts)
        blocks = count_blocks(tokens, experts, slots)
        # Were the tokens spread evenly at random.
        live = max(experts * (1 - (1 - 1 / experts) ** tokens), tokens / slots)
        shared = -(-tokens // slots) if has_shared else 0
        blocks, live = blocks + shared, live + shared
        tiles = choose_tiles(
            data.dtype.type,
            slots,
            rows,
            columns,
            blocks=blocks,
            live=live,
            sms=self.sms,
            is_held=is_held and data.dtype == FP8 and tokens <= min(self.held, slots),
        )
        return None if tiles is None else Plan(slots, blocks, tiles)

    def _round(self, x_TU: Array, dtype: Any) -> tuple[Array, Array | None]:
        """Tokens as weights of a dtype want them, and the scales of fp8."""
        if dtype == FP8:
            return round_rows(x_TU, slots=len(x_TU), interpret=self.interpret)
        return x_TU, None

    def _multiply_tokens(
        self, x_TU: Array, weights: tuple[Weight, ...], where: Slots, plan: "Plan", leading: int = 0
    ) -> tuple[Array, Array | None]:
        """`_multiply_slots` of tokens that are yet to take their slots, and their scales in fp8."""
        if plan.tiles.is_held:
            case = _list_operands(weights, where), self._list_options(plan, leading)
            return multiply_held(x_TU, *case[0], slots=plan.slots, **case[1])
        is_in_order = _is_alone(weights)
        slots, scale_T = plan.blocks * plan.slots, None
        if _get_data(weights[0]).dtype == FP8:
            x_SU, scale_T = round_rows(
                x_TU,
                None if is_in_order else where.slot_T,
                slots=slots,
                has_leading=leading > 0,
                interpret=self.interpret,
            )
        else:
            x_SU = (
                jnp.pad(x_TU, ((0, slots - len(x_TU)), (0, 0)))
                if is_in_order
                else x_TU[where.token_S]
            )
            if _get_data(weights[0]).dtype == jnp.int4:
                x_SU = permute_columns(x_SU)
        return self._multiply_slots(x_SU, weights, where, plan, leading), scale_T

    def _multiply_slots(
        self, x_SU: Array, weights: tuple[Weight, ...], where: Slots, plan: "Plan", leading: int = 0
    ) -> Array:
        """[P, S, O]: parts, to be added up; not yet scaled as the tokens are."""
        x_ITU = x_SU.reshape(plan.blocks, plan.slots, -1)
        operands = _list_operands(weights, where)
        return multiply_blocks(x_ITU, *operands, **self._list_options(plan, leading))

    def _list_options(self, plan: "Plan", leading: int) -> dict[str, Any]:
        return {
            "tiles": plan.tiles,
            "dtype": jnp.bfloat16 if plan.tiles.splits == 1 else jnp.float32,
            "sms": self.sms,
            "leading": leading,
            "interpret": self.interpret,
        }

    def attend(
        self,
        q_TKGH: Array,
        k_TKH: Array,
        v_TKH: Array,
        k_PKZH: Array,
        v_PKZH: Array,
        table_RB: Array,
        row_T: Array,
        position_T: Array,
    ) -> tuple[Array, Array, Array]:
        """`reference.attend`."""
        case = (q_TKGH, k_TKH, v_TKH, k_PKZH, v_PKZH, table_RB, row_T, position_T)
        if not pages.is_supported(q_TKGH, k_PKZH):
            return portable.attend(*case)
        how: Any = {"is_paired": self.is_paired, "interpret": self.interpret}
        return pages.attend(*case, sms=self.sms, **how)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How tokens are multiplied by the matrices of experts."""

    slots: int  # of a block
    blocks: int
    tiles: Tiles


def _get_data(weight: Weight) -> Array:
    return weight.data if isinstance(weight, Quantized) else weight


def _get_scale(weight: Weight) -> Array:
    assert isinstance(weight, Quantized)
    return weight.scale.astype(jnp.float32)


def _is_alone(weights: tuple[Weight, ...]) -> bool:
    """Whether there is one matrix, so that the tokens take the first slots in order."""
    return sum(weight.shape[0] for weight in weights) == 1


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


def _list_operands(weights: tuple[Weight, ...], where: Slots) -> tuple[Any, ...]:
    """What the kernels over blocks take behind the tokens."""
    scales = tuple(map(_get_scale, weights)) if isinstance(weights[0], Quantized) else ()
    return tuple(map(_get_data, weights)), scales, where.expert_I, where.count


def _reshape(weight: Weight, experts: int, rows: int) -> Any:
    """With one axis for the experts and one for the rows of a matrix, [E, O, U]; scales alike."""
    if not isinstance(weight, Quantized):
        return weight.reshape(experts, rows, -1)
    groups = (-1,) if weight.data.dtype == jnp.int4 else ()
    data = weight.data.reshape(experts, rows, -1)
    return Quantized(data, weight.scale.reshape(experts, rows, *groups))


def _multiply_by_xla(x_TU: Array, x_scale_T: Array | None, weight_EOU: Weight) -> Array:
    """Many tokens times one matrix, by the library: e4m3 times e4m3; int4 is made wide first."""
    if x_scale_T is None:
        return lax.dot_general(x_TU, formats.dequantize(weight_EOU, x_TU.dtype)[0], _LAST)
    y_TO = lax.dot_general(
        x_TU, _get_data(weight_EOU)[0], _LAST, preferred_element_type=jnp.bfloat16
    )
    scale_O = _get_scale(weight_EOU)[0]
    return (y_TO.astype(jnp.float32) * x_scale_T[:, None] * scale_O).astype(jnp.bfloat16)
