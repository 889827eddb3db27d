"""Products with weights of any format on Hopper GPUs: which of them our kernels run, how tokens
come to their slots, and what is left to the library."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from l4jax.kernels import formats, reference
from l4jax.kernels.blocks import GROUP, multiply_blocks, multiply_held, permute_columns
from l4jax.kernels.formats import FP8, Quantized, Weight
from l4jax.kernels.reference import Norm
from l4jax.kernels.routing import Slots, assign_slots, count_blocks, keep_order
from l4jax.kernels.rows import THREADS, normalize_rows, round_rows
from l4jax.kernels.slots import assign_at_once, can_assign
from l4jax.kernels.tiles import Tiles, choose_slots, choose_tiles

FEW = 128  # tokens up to which a dense product is bound by reading its weights
_HELD = 8  # tokens up to which products in fp8 round them themselves: a launch less for each
_TALL = 8  # rows to a column of a bfloat16 matrix, as of the head, that is better read by us
_LAST = (((1,), (1,)), ((), ()))  # both sides are summed over their last axis


@dataclasses.dataclass(frozen=True)
class Plan:
    """How tokens are multiplied by the matrices of experts."""

    slots: int  # of a block
    blocks: int
    tiles: Tiles


@dataclasses.dataclass(frozen=True)
class Parts:
    """A product as a kernel leaves it, for the next one to finish.

    Attributes:
        parts_PSO: to be added up; the tokens come first.
        scale_S, scale_O: float32, what the sums are yet to be multiplied by, where they are.
    """

    parts_PSO: Array
    scale_S: Array | None = None
    scale_O: Array | None = None

    def finish(self, tokens: int) -> Array:
        """[T, O] float32."""
        y_TO = self.parts_PSO[:, :tokens].astype(jnp.float32).sum(axis=0)
        if self.scale_S is not None:
            y_TO = y_TO * self.scale_S[:tokens, None]
        return y_TO if self.scale_O is None else y_TO * self.scale_O


@dataclasses.dataclass(frozen=True)
class Products:
    """Products on one kind of device; for the attributes see `hopper.Hopper`."""

    sms: int
    interpret: Any

    def normalize(self, x_TU: Array, norm: Norm | None) -> Array:
        """`reference.normalize`, in one launch where XLA makes two."""
        if norm is None or x_TU.shape[1] % THREADS or x_TU.dtype != jnp.bfloat16:
            return reference.normalize(x_TU, norm)
        return normalize_rows(x_TU, norm, interpret=self.interpret)

    def prepare(self, x_TU: Array, norm: Norm | None, weight: Weight) -> tuple[Array, Norm | None]:
        """Tokens for a weight, and the norm that they are yet to be read through: what rounds them
        for fp8 does that, too."""
        if get_data(weight).dtype == FP8 and x_TU.dtype == jnp.bfloat16:
            return x_TU, norm
        return self.normalize(x_TU, norm), None

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
        y_TO = self.multiply_rows(x.reshape(tokens, -1), None, weight, rows).finish(tokens)
        shape = (*x.shape[: len(x_left)], *weight.shape[: len(w_left)])
        order = [(x_left + w_left).index(letter) for letter in out]
        return y_TO.astype(x.dtype).reshape(shape).transpose(order)

    def multiply_rows(self, x_TU: Array, norm: Norm | None, weight: Weight, rows: int) -> Parts:
        """Tokens in bfloat16, read through a norm, times one matrix of so many rows."""
        tokens = x_TU.shape[0]
        x_TU, norm = self.prepare(x_TU, norm, weight)
        is_tall = rows >= _TALL * x_TU.shape[1] and tokens <= FEW
        if not isinstance(weight, Quantized) and not is_tall:
            # In two axes each: of more that are summed over XLA writes the whole weight down anew,
            # transposed, in each step.
            return Parts(lax.dot_general(x_TU, weight.reshape(rows, -1), _LAST)[None])
        weight_EOU = stack(weight, 1, rows)
        plan = self.plan(weight_EOU, tokens)
        if plan is None or tokens > FEW:
            return multiply_by_xla(*self.round(x_TU, norm, weight_EOU), weight_EOU)
        where = self.assign(jnp.zeros(tokens, jnp.int32), 1, plan)
        return Parts(*self.multiply_tokens(x_TU, norm, (weight_EOU,), where, plan))

    def assign(self, expert_T: Array, experts: int, plan: Plan, leading: int = 0) -> Slots:
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

    def plan(
        self, weight_EOU: Weight, tokens: int, *, has_shared: bool = False, is_held: bool = True
    ) -> Plan | None:
        """How to multiply tokens by the matrices of experts, and by one that all share; None where
        the kernel cannot. Few tokens are held, unless they are not the same to each expert."""
        data, (experts, rows, columns) = get_data(weight_EOU), weight_EOU.shape
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
            is_held=is_held and data.dtype == FP8 and tokens <= min(_HELD, slots),
        )
        return None if tiles is None else Plan(slots, blocks, tiles)

    def round(self, x_TU: Array, norm: Norm | None, weight: Weight) -> tuple[Array, Array | None]:
        """What `prepare` gave as the weight wants it, and the scales of fp8."""
        if get_data(weight).dtype == FP8:
            return round_rows(x_TU, norm, slots=len(x_TU), interpret=self.interpret)
        return x_TU, None

    def multiply_tokens(
        self,
        x_TU: Array,
        norm: Norm | None,
        weights: tuple[Weight, ...],
        where: Slots,
        plan: Plan,
        leading: int = 0,
    ) -> tuple[Array, Array | None]:
        """`multiply_slots` of what `prepare` gave, which is yet to take its slots, and the scales
        of fp8."""
        if plan.tiles.is_held:
            operands, options = _list_operands(weights, where), self._list_options(plan, leading)
            return multiply_held(x_TU, norm, *operands, slots=plan.slots, **options)
        is_in_order = is_alone(weights)
        slots, scale_T = plan.blocks * plan.slots, None
        if get_data(weights[0]).dtype == FP8:
            x_SU, scale_T = round_rows(
                x_TU,
                norm,
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
            if get_data(weights[0]).dtype == jnp.int4:
                x_SU = permute_columns(x_SU)
        return self.multiply_slots(x_SU, weights, where, plan, leading), scale_T

    def multiply_slots(
        self, x_SU: Array, weights: tuple[Weight, ...], where: Slots, plan: Plan, leading: int = 0
    ) -> Array:
        """[P, S, O]: parts, to be added up; not yet scaled as the tokens are."""
        x_ITU = x_SU.reshape(plan.blocks, plan.slots, -1)
        operands = _list_operands(weights, where)
        return multiply_blocks(x_ITU, *operands, **self._list_options(plan, leading))

    def _list_options(self, plan: Plan, leading: int) -> dict[str, Any]:
        return {
            "tiles": plan.tiles,
            "dtype": jnp.bfloat16 if plan.tiles.splits == 1 else jnp.float32,
            "sms": self.sms,
            "leading": leading,
            "interpret": self.interpret,
        }


def get_data(weight: Weight) -> Array:
    return weight.data if isinstance(weight, Quantized) else weight


def _get_scale(weight: Weight) -> Array:
    assert isinstance(weight, Quantized)
    return weight.scale.astype(jnp.float32)


def is_alone(weights: tuple[Weight, ...]) -> bool:
    """Whether there is one matrix, so that the tokens take the first slots in order."""
    return sum(weight.shape[0] for weight in weights) == 1


def _list_operands(weights: tuple[Weight, ...], where: Slots) -> tuple[Any, ...]:
    """What the kernels over blocks take behind the tokens."""
    scales = tuple(map(_get_scale, weights)) if isinstance(weights[0], Quantized) else ()
    return tuple(map(get_data, weights)), scales, where.expert_I, where.count


def stack(weight: Weight, experts: int, rows: int) -> Any:
    """With one axis for the experts and one for the rows of a matrix, [E, O, U]; scales alike."""
    if not isinstance(weight, Quantized):
        return weight.reshape(experts, rows, -1)
    groups = (-1,) if weight.data.dtype == jnp.int4 else ()
    data = weight.data.reshape(experts, rows, -1)
    return Quantized(data, weight.scale.reshape(experts, rows, *groups))


def multiply_by_xla(x_TU: Array, x_scale_T: Array | None, weight_EOU: Weight) -> Parts:
    """Many tokens times one matrix, by the library: e4m3 times e4m3; int4 is made wide first."""
    if x_scale_T is None:
        wide_OU = formats.dequantize(weight_EOU, x_TU.dtype)[0]
        return Parts(lax.dot_general(x_TU, wide_OU, _LAST)[None])
    y_TO = lax.dot_general(
        x_TU, get_data(weight_EOU)[0], _LAST, preferred_element_type=jnp.bfloat16
    )
    return Parts(y_TO[None], x_scale_T, _get_scale(weight_EOU)[0])
