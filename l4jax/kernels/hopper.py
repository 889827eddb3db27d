"""Accelerations for Hopper GPUs (compute capability 9.0), with the signatures of `reference`.

What a kernel here cannot run, a strange shape or a format, goes to the definition or to
`portable`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from l4jax.kernels import pages, portable, reference
from l4jax.kernels.experts import Experts
from l4jax.kernels.formats import Weight
from l4jax.kernels.products import Products
from l4jax.kernels.rows import normalize_rows

_THREADS = 128  # of a warpgroup: what a row is a multiple of


@dataclasses.dataclass(frozen=True)
class Hopper:
    """The kernels on one kind of device.

    Attributes:
        sms: multiprocessors of the device.
        interpret: what `pallas` interprets kernels with, where there is no such device.
        held: tokens up to which products in fp8 round them themselves, at most 8. A launch less for
            each of three products of a layer; none, until a device has shown what it gives.
        is_paired: see `pages.attend`; not taken either until then.
    """

    sms: int
    interpret: Any = None
    held: int = 0
    is_paired: bool = False

    @property
    def _products(self) -> Products:
        return Products(self.sms, self.held, self.interpret)

    def normalize(self, x_TD: Array, scale_D: Array, eps: float) -> Array:
        """`reference.normalize`, in one launch where XLA makes two."""
        if x_TD.shape[1] % _THREADS or x_TD.dtype != jnp.bfloat16:
            return reference.normalize(x_TD, scale_D, eps)
        return normalize_rows(x_TD, scale_D, eps=eps, interpret=self.interpret)

    def multiply(self, subscripts: str, x: Array, weight: Weight) -> Array:
        """`formats.multiply`."""
        return self._products.multiply(subscripts, x, weight)

    def run_experts(
        self, x_TD: Array, expert_T: Array, gate_up_EcFD: Weight, down_EDF: Weight
    ) -> Array:
        """`reference.run_experts`."""
        return Experts(self._products).run(x_TD, expert_T, gate_up_EcFD, down_EDF)

    def mix_experts(self, x_TD: Array, expert_T: Array, gate_T: Array, *weights: Weight) -> Array:
        """`reference.mix_experts`."""
        return Experts(self._products).mix(x_TD, expert_T, gate_T, *weights)

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
