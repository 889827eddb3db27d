"""Dispatch: the kernel bundle for Hopper GPUs (compute capability 9.0), with fallbacks.

A shape or format that no kernel here runs goes to the definition or to `portable`.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from l4jax.kernels import portable, reference
from l4jax.kernels.formats import Adapted, Weight
from l4jax.kernels.hopper import attention
from l4jax.kernels.hopper.heuristics import can_run_router
from l4jax.kernels.hopper.linear import Linear
from l4jax.kernels.hopper.moe import Experts
from l4jax.kernels.hopper.qkv_epilogue import write_heads
from l4jax.kernels.hopper.router import route_tokens
from l4jax.kernels.reference import HeadTransform, Norm


@dataclasses.dataclass(frozen=True)
class Hopper:
    """Kernels for one kind of device.

    Attributes:
        sms: multiprocessors of the device.
        interpret: Pallas's interpreter parameters, on a device that is not a Hopper GPU.
    """

    sms: int
    interpret: Any = None

    @property
    def _linear(self) -> Linear:
        return Linear(self.sms, self.interpret)

    def normalize(self, x_TD: Array, norm: Norm | None) -> Array:
        """Compute `reference.normalize`."""
        return self._linear.normalize(x_TD, norm)

    def multiply(self, subscripts: str, x: Array, weight: Weight) -> Array:
        """Compute `formats.multiply`."""
        return self._linear.multiply(subscripts, x, weight)

    def route(
        self, x_TD: Array, norm: Norm | None, router_ED: Weight
    ) -> tuple[Array, Array, Array]:
        """Compute `reference.route`; a decode step takes one launch."""
        (tokens, width), experts = x_TD.shape, router_ED.shape[0]
        is_bfloat16 = isinstance(router_ED, Array) and x_TD.dtype == router_ED.dtype == jnp.bfloat16
        if not is_bfloat16 or not can_run_router(tokens, experts, width):
            return reference.route(self.normalize(x_TD, norm), None, router_ED)
        return route_tokens(x_TD, norm, router_ED, interpret=self.interpret)

    def run_experts(
        self,
        x_TD: Array,
        norm: Norm | None,
        expert_T: Array,
        gate_up_EcFD: Weight,
        down_EDF: Weight,
        *,
        is_partial: bool = False,
    ) -> Array:
        """Compute `reference.run_experts`."""
        if is_partial:
            x_TD = self.normalize(x_TD, norm)
            return reference.run_experts(
                x_TD, None, expert_T, gate_up_EcFD, down_EDF, is_partial=True
            )
        return Experts(self._linear).run(x_TD, norm, expert_T, gate_up_EcFD, down_EDF)

    def mix_experts(
        self,
        x_TD: Array,
        norm: Norm | None,
        expert_T: Array,
        gate_T: Array,
        *weights: Weight,
        is_partial: bool = False,
    ) -> Array:
        """Compute `reference.mix_experts`."""
        if is_partial:
            x_TD = self.normalize(x_TD, norm)
            return reference.mix_experts(x_TD, None, expert_T, gate_T, *weights, is_partial=True)
        return Experts(self._linear).mix(x_TD, norm, expert_T, gate_T, *weights)

    def attend(
        self,
        x_TD: Array,
        norm: Norm | None,
        qkv_KJHD: Weight,
        transform: HeadTransform,
        k_PKZH: Array,
        v_PKZH: Array,
        table_RB: Array,
        row_T: Array,
        position_T: Array,
    ) -> tuple[Array, Array, Array]:
        """Compute `reference.attend`: projection, epilogue with the write to cache, attention.

        Other pages, dtypes and weights with an adapter fall back to `portable`'s attention.
        """
        tables, shape = (table_RB, row_T, position_T), qkv_KJHD.shape[:3]
        is_supported = attention.is_supported(x_TD.dtype, shape[1], k_PKZH)
        if not is_supported or isinstance(qkv_KJHD, Adapted):
            x_TD = self.normalize(x_TD, norm)
            qkv_TKJH = self.multiply("TD,KJHD->TKJH", x_TD, qkv_KJHD)
            heads = reference.transform_heads(qkv_TKJH, transform)
            return portable.attend_heads(heads, transform, k_PKZH, v_PKZH, *tables)
        qkv = self._linear.multiply_dense(x_TD, norm, qkv_KJHD, math.prod(shape))
        x_TKUH, k_PKZH, v_PKZH = write_heads(
            qkv.parts_PSO.reshape(*qkv.parts_PSO.shape[:2], *shape),
            qkv.scale_S,
            None if qkv.scale_O is None else qkv.scale_O.reshape(shape),
            transform,
            k_PKZH,
            v_PKZH,
            *tables,
            interpret=self.interpret,
        )
        y_TKGH = attention.attend(
            x_TKUH,
            k_PKZH,
            v_PKZH,
            *tables,
            heads=shape[1] - 2,
            sms=self.sms,
            interpret=self.interpret,
        )
        return transform.restore(y_TKGH), k_PKZH, v_PKZH
