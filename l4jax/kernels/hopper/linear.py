"""Matmuls with weights of any format: which kernel runs, how tokens get their slots, and cuBLAS.

Up to 128 tokens a dense fp8 or int4 matmul is a grouped matmul with one expert; more tokens go to
XLA's library (int4 weights are dequantized first). bfloat16 matmuls stay with the library, except
for tall matrices of few tokens, such as the head.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from l4jax.config import INT4_GROUP
from l4jax.kernels import formats, reference
from l4jax.kernels.formats import FP8, Quantized, Weight
from l4jax.kernels.hopper.elementwise import normalize_rows, quantize_rows
from l4jax.kernels.hopper.grouped_matmul import grouped_matmul, grouped_matmul_resident
from l4jax.kernels.hopper.heuristics import (
    MEMORY_BOUND_TOKENS,
    RESIDENT_TOKENS,
    TALL_RATIO,
    TileConfig,
    can_run_rows,
    choose_slots,
    choose_tile_config,
    estimate_active_blocks,
)
from l4jax.kernels.hopper.int4 import permute_columns
from l4jax.kernels.hopper.slot_assignment import (
    SlotAssignment,
    assign_slots,
    assign_slots_in_kernel,
    can_assign_in_kernel,
    count_blocks,
    keep_token_order,
)
from l4jax.kernels.reference import Norm

_LAST_AXES = (((1,), (1,)), ((), ()))  # dot_general dimension numbers: contract both last axes


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Blocks and tiling of a grouped matmul."""

    slots: int  # per block
    blocks: int
    tiles: TileConfig


@dataclasses.dataclass(frozen=True)
class PartialProducts:
    """Split-K partial products of a matmul, which the next kernel sums and scales.

    Attributes:
        parts_PSO: partial products; the tokens take the first slots.
        scale_S, scale_O: float32 scales of the sums, None without.
    """

    parts_PSO: Array
    scale_S: Array | None = None
    scale_O: Array | None = None

    def sum(self, tokens: int) -> Array:
        """Return the sums [T, O] float32, scaled."""
        y_TO = self.parts_PSO[:, :tokens].astype(jnp.float32).sum(axis=0)
        if self.scale_S is not None:
            y_TO = y_TO * self.scale_S[:tokens, None]
        return y_TO if self.scale_O is None else y_TO * self.scale_O


@dataclasses.dataclass(frozen=True)
class Linear:
    """Matmuls on one kind of device; for the attributes see `dispatch.Hopper`."""

    sms: int
    interpret: Any

    def normalize(self, x_TU: Array, norm: Norm | None) -> Array:
        """Compute `reference.normalize`, in one launch where XLA makes two."""
        if norm is None or not can_run_rows(x_TU.shape[1]) or x_TU.dtype != jnp.bfloat16:
            return reference.normalize(x_TU, norm)
        return normalize_rows(x_TU, norm, interpret=self.interpret)

    def prepare(self, x_TU: Array, norm: Norm | None, weight: Weight) -> tuple[Array, Norm | None]:
        """Normalize tokens, or leave it to their quantization: return the norm still to apply."""
        if get_data(weight).dtype == FP8 and x_TU.dtype == jnp.bfloat16:
            return x_TU, norm
        return self.normalize(x_TU, norm), None

    def multiply(self, subscripts: str, x: Array, weight: Weight) -> Array:
        """Compute `formats.multiply`."""
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
        y_TO = self.multiply_dense(x.reshape(tokens, -1), None, weight, rows).sum(tokens)
        shape = (*x.shape[: len(x_left)], *weight.shape[: len(w_left)])
        order = [(x_left + w_left).index(letter) for letter in out]
        return y_TO.astype(x.dtype).reshape(shape).transpose(order)

    def multiply_dense(
        self, x_TU: Array, norm: Norm | None, weight: Weight, rows: int
    ) -> PartialProducts:
        """Multiply bfloat16 tokens, after a norm, by one matrix with this number of rows."""
        tokens = x_TU.shape[0]
        x_TU, norm = self.prepare(x_TU, norm, weight)
        is_tall = rows >= TALL_RATIO * x_TU.shape[1] and tokens <= MEMORY_BOUND_TOKENS
        if not isinstance(weight, Quantized) and not is_tall:
            # Two axes each: with several contracted axes XLA transposes the whole weight in every
            # step.
            return PartialProducts(
                lax.dot_general(x_TU, weight.reshape(rows, -1), _LAST_AXES)[None]
            )
        weight_EOU = stack(weight, 1, rows)
        config = self.configure(weight_EOU, tokens)
        if config is None or tokens > MEMORY_BOUND_TOKENS:
            return multiply_by_library(*self.quantize(x_TU, norm, weight_EOU), weight_EOU)
        assignment = self.assign(jnp.zeros(tokens, jnp.int32), 1, config)
        return PartialProducts(*self.multiply_tokens(x_TU, norm, (weight_EOU,), assignment, config))

    def assign(
        self, expert_T: Array, experts: int, config: MatmulConfig, shared_blocks: int = 0
    ) -> SlotAssignment:
        """Compute `assign_slots`, in one launch where the tokens are few."""
        if can_assign_in_kernel(len(expert_T), experts):
            return assign_slots_in_kernel(
                expert_T,
                experts=experts,
                slots=config.slots,
                shared_blocks=shared_blocks,
                keeps_order=config.tiles.is_resident,
                interpret=self.interpret,
            )
        assignment = assign_slots(expert_T, experts, config.slots, shared_blocks)
        if config.tiles.is_resident:
            assignment = keep_token_order(assignment, config.slots)
        # A barrier: XLA would recompute the assignment for each element that reads it.
        return lax.optimization_barrier(assignment) if experts > 1 else assignment

    def configure(
        self,
        weight_EOU: Weight,
        tokens: int,
        *,
        has_shared: bool = False,
        can_be_resident: bool = True,
    ) -> MatmulConfig | None:
        """Configure a grouped matmul of tokens by the matrices of experts.

        Args:
            weight_EOU: stacked matrices.
            tokens: number of tokens.
            has_shared: whether a shared expert takes all tokens, too.
            can_be_resident: whether every expert sees the same tokens, so that few of them may be
                resident.

        Returns:
            None where the kernel cannot run.
        """
        data, (experts, rows, columns) = get_data(weight_EOU), weight_EOU.shape
        if data.dtype == jnp.int4 and columns != _get_scale(weight_EOU).shape[-1] * INT4_GROUP:
            return None
        slots = choose_slots(tokens, experts)
        shared_blocks = -(-tokens // slots) if has_shared else 0
        tiles = choose_tile_config(
            data.dtype.type,
            slots,
            rows,
            columns,
            blocks=count_blocks(tokens, experts, slots) + shared_blocks,
            active_blocks=estimate_active_blocks(tokens, experts, slots) + shared_blocks,
            sms=self.sms,
            can_be_resident=(
                can_be_resident and data.dtype == FP8 and tokens <= min(RESIDENT_TOKENS, slots)
            ),
        )
        if tiles is None:
            return None
        return MatmulConfig(slots, count_blocks(tokens, experts, slots) + shared_blocks, tiles)

    def quantize(
        self, x_TU: Array, norm: Norm | None, weight: Weight
    ) -> tuple[Array, Array | None]:
        """Quantize prepared tokens where the weight is fp8; return their scales, or None."""
        if get_data(weight).dtype == FP8:
            if not can_run_rows(x_TU.shape[1]):
                return formats.quantize_tokens(self.normalize(x_TU, norm), (1,))
            return quantize_rows(x_TU, norm, slots=len(x_TU), interpret=self.interpret)
        return x_TU, None

    def multiply_tokens(
        self,
        x_TU: Array,
        norm: Norm | None,
        weights: tuple[Weight, ...],
        assignment: SlotAssignment,
        config: MatmulConfig,
        shared_blocks: int = 0,
    ) -> tuple[Array, Array | None]:
        """Put prepared tokens into their slots and multiply: return partial products and scales.

        Only fp8 tokens have scales.
        """
        if config.tiles.is_resident:
            operands = _list_operands(weights, assignment)
            options = self._list_options(config, shared_blocks)
            return grouped_matmul_resident(x_TU, norm, *operands, slots=config.slots, **options)
        is_in_order = is_single(weights)
        slots, scale_T = config.blocks * config.slots, None
        if get_data(weights[0]).dtype == FP8:
            x_SU, scale_T = quantize_rows(
                x_TU,
                norm,
                None if is_in_order else assignment.slot_T,
                slots=slots,
                has_shared=shared_blocks > 0,
                interpret=self.interpret,
            )
        else:
            x_SU = (
                jnp.pad(x_TU, ((0, slots - len(x_TU)), (0, 0)))
                if is_in_order
                else x_TU[assignment.token_S]
            )
            if get_data(weights[0]).dtype == jnp.int4:
                x_SU = permute_columns(x_SU)
        return self.multiply_slots(x_SU, weights, assignment, config, shared_blocks), scale_T

    def multiply_slots(
        self,
        x_SU: Array,
        weights: tuple[Weight, ...],
        assignment: SlotAssignment,
        config: MatmulConfig,
        shared_blocks: int = 0,
    ) -> Array:
        """Multiply filled slots: [P, S, O] partial products, not scaled by the tokens' scales."""
        x_ITU = x_SU.reshape(config.blocks, config.slots, -1)
        operands = _list_operands(weights, assignment)
        return grouped_matmul(x_ITU, *operands, **self._list_options(config, shared_blocks))

    def _list_options(self, config: MatmulConfig, shared_blocks: int) -> dict[str, Any]:
        return {
            "tiles": config.tiles,
            "dtype": jnp.bfloat16 if config.tiles.split_k == 1 else jnp.float32,
            "sms": self.sms,
            "shared_blocks": shared_blocks,
            "interpret": self.interpret,
        }


def get_data(weight: Weight) -> Array:
    """Return the data of a weight without its scales."""
    return weight.data if isinstance(weight, Quantized) else weight


def _get_scale(weight: Weight) -> Array:
    assert isinstance(weight, Quantized)
    return weight.scale.astype(jnp.float32)


def is_single(weights: tuple[Weight, ...]) -> bool:
    """Return whether there is one matrix, so that the tokens take the first slots in order."""
    return sum(weight.shape[0] for weight in weights) == 1


def _list_operands(weights: tuple[Weight, ...], assignment: SlotAssignment) -> tuple[Any, ...]:
    """List the operands of a grouped matmul after the tokens."""
    scales = tuple(map(_get_scale, weights)) if isinstance(weights[0], Quantized) else ()
    return tuple(map(get_data, weights)), scales, assignment.expert_I, assignment.count


def stack(weight: Weight, experts: int, rows: int) -> Any:
    """Reshape a weight and its scales to one axis of experts and one of rows: [E, O, U]."""
    if not isinstance(weight, Quantized):
        return weight.reshape(experts, rows, -1)
    groups = (-1,) if weight.data.dtype == jnp.int4 else ()
    data = weight.data.reshape(experts, rows, -1)
    return Quantized(data, weight.scale.reshape(experts, rows, *groups))


def multiply_by_library(
    x_TU: Array, x_scale_T: Array | None, weight_EOU: Weight
) -> PartialProducts:
    """Multiply many tokens by one matrix with XLA's library: e4m3 by e4m3, or bfloat16.

    int4 weights are dequantized first.
    """
    if x_scale_T is None:
        weight_OU = formats.dequantize(weight_EOU, x_TU.dtype)[0]
        return PartialProducts(lax.dot_general(x_TU, weight_OU, _LAST_AXES)[None])
    y_TO = lax.dot_general(
        x_TU, get_data(weight_EOU)[0], _LAST_AXES, preferred_element_type=jnp.bfloat16
    )
    return PartialProducts(y_TO[None], x_scale_T, _get_scale(weight_EOU)[0])
