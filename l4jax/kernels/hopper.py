"""Accelerations for Hopper GPUs (compute capability 9.0), with the signatures of `reference`.

What a kernel here cannot run, a strange shape or a format, goes to the definition or to
`portable`.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from l4jax.kernels import pages, portable, reference
from l4jax.kernels.experts import Experts
from l4jax.kernels.formats import Adapted, Weight
from l4jax.kernels.heads import place_heads
from l4jax.kernels.products import Products
from l4jax.kernels.reference import HeadTransform, Norm
from l4jax.kernels.rows import THREADS, route_rows

_ROUTED = 256  # tokens up to which a thread block each is faster than a product
_MOST_EXPERTS = 32  # whose scores a thread block finds before it is what a step waits for


@dataclasses.dataclass(frozen=True)
class Hopper:
    """The kernels on one kind of device.

    Attributes:
        sms: multiprocessors of the device.
        interpret: what `pallas` interprets kernels with, where there is no such device.
    """

    sms: int
    interpret: Any = None

    @property
    def _products(self) -> Products:
        return Products(self.sms, self.interpret)

    def normalize(self, x_TD: Array, norm: Norm | None) -> Array:
        """`reference.normalize`."""
        return self._products.normalize(x_TD, norm)

    def multiply(self, subscripts: str, x: Array, weight: Weight) -> Array:
        """`formats.multiply`."""
        return self._products.multiply(subscripts, x, weight)

    def route(
        self, x_TD: Array, norm: Norm | None, router_ED: Weight
    ) -> tuple[Array, Array, Array]:
        """`reference.route`, of a decode step in one launch."""
        (tokens, width), experts = x_TD.shape, router_ED.shape[0]
        can_run = isinstance(router_ED, Array) and x_TD.dtype == router_ED.dtype == jnp.bfloat16
        if not can_run or width % THREADS or tokens > _ROUTED or experts > _MOST_EXPERTS:
            return reference.route(self.normalize(x_TD, norm), None, router_ED)
        return route_rows(x_TD, norm, router_ED, interpret=self.interpret)

    def run_experts(
        self,
        x_TD: Array,
        norm: Norm | None,
        expert_T: Array,
        gate_up_EcFD: Weight,
        down_EDF: Weight,
    ) -> Array:
        """`reference.run_experts`."""
        return Experts(self._products).run(x_TD, norm, expert_T, gate_up_EcFD, down_EDF)

    def mix_experts(
        self, x_TD: Array, norm: Norm | None, expert_T: Array, gate_T: Array, *weights: Weight
    ) -> Array:
        """`reference.mix_experts`."""
        return Experts(self._products).mix(x_TD, norm, expert_T, gate_T, *weights)

    def attend(
        self,
        x_TD: Array,
        norm: Norm | None,
        qkv_KJHD: Weight,
        turn: HeadTransform,
        k_PKZH: Array,
        v_PKZH: Array,
        table_RB: Array,
        row_T: Array,
        position_T: Array,
    ) -> tuple[Array, Array, Array]:
        """`reference.attend`."""
        where, shape = (table_RB, row_T, position_T), qkv_KJHD.shape[:3]
        if not pages.is_supported(x_TD.dtype, shape[1], k_PKZH) or isinstance(qkv_KJHD, Adapted):
            case = (self.normalize(x_TD, norm), None, qkv_KJHD, turn, k_PKZH, v_PKZH, *where)
            return portable.attend(*case, multiply=self.multiply)
        qkv = self._products.multiply_rows(x_TD, norm, qkv_KJHD, math.prod(shape))
        x_TKUH, k_PKZH, v_PKZH = place_heads(
            qkv.parts_PSO.reshape(*qkv.parts_PSO.shape[:2], *shape),
            qkv.scale_S,
            None if qkv.scale_O is None else qkv.scale_O.reshape(shape),
            turn,
            k_PKZH,
            v_PKZH,
            *where,
            interpret=self.interpret,
        )
        how: Any = {"heads": shape[1] - 2, "sms": self.sms, "interpret": self.interpret}
        y_TKGH = pages.attend(x_TKUH, k_PKZH, v_PKZH, *where, **how)
        return turn.restore(y_TKGH), k_PKZH, v_PKZH
