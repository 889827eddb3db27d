"""Context parallelism: the global layers' pages are striped over devices.

A page of a global layer has `stripes` times the positions of a local one: each device of the
sequence axis stores one stripe of it, in its own page of the same id. So a page id means the same
on all devices and in all layers, and a request's positions are spread evenly.

Positions ascend within a device's stripes. A token therefore sees a prefix of them, and attention
on one device is plain causal attention with other positions. The devices' outputs are merged by
their log-sum-exp, which is exact.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from l4jax import axes
from l4jax.kernels import Kernels
from l4jax.kernels.formats import Weight
from l4jax.kernels.reference import HeadTransform, Norm
from sharding import Layout

GATHERED_TOKENS = 64  # up to these, one gather merges faster than two reductions

_lax: Any = lax  # the types of collectives are partially unknown


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """Attention of a global layer on one device's stripes, inside `Layout.local`.

    Attributes:
        kernels: for one device.
        layout: its strategy stripes pages.
    """

    kernels: Kernels
    layout: Layout

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
        """Compute `reference.attend`; the table has one column for a page of all stripes."""
        stripe, stripes = k_PKZH.shape[2], self.layout.count(axes.STRIPES)
        index = self.layout.find_index(axes.STRIPES)
        last_T = find_last_stored(position_T, stripe, stripes, index)
        is_own_T = (position_T >= 0) & (position_T // stripe % stripes == index)
        y_TKGH, lse_TKG, k_PKZH, v_PKZH = self.kernels.attend_part(
            x_TD,
            norm,
            qkv_KJHD,
            transform,
            k_PKZH,
            v_PKZH,
            table_RB,
            row_T,
            last_T,
            jnp.where(is_own_T, last_T, -1),
        )
        y_TKGH = self._merge(y_TKGH, lse_TKG).astype(x_TD.dtype)
        return transform.restore(y_TKGH), k_PKZH, v_PKZH

    def _merge(self, y_TKGH: Array, lse_TKG: Array) -> Array:
        """Merge the devices' outputs, float32, weighted by the softmax mass that each has seen."""
        places = self.layout.find(axes.STRIPES)
        packed_TKGH = jnp.concatenate([y_TKGH, lse_TKG[..., None]], axis=-1)
        if len(y_TKGH) <= GATHERED_TOKENS:
            packed_STKGH = _lax.all_gather(packed_TKGH, places)
            lse_STKG = packed_STKGH[..., -1]
            weight_STKG = jnp.exp(lse_STKG - lse_STKG.max(axis=0))
            sum_TKGH = (packed_STKGH[..., :-1] * weight_STKG[..., None]).sum(axis=0)
            return sum_TKGH / weight_STKG.sum(axis=0)[..., None]
        weight_TKG1 = jnp.exp(lse_TKG - _lax.pmax(lse_TKG, places))[..., None]
        packed_TKGH = jnp.concatenate([y_TKGH * weight_TKG1, weight_TKG1], axis=-1)
        sum_TKGH = _lax.psum(packed_TKGH, places)
        return sum_TKGH[..., :-1] / sum_TKGH[..., -1:]


def find_last_stored(position_T: Array, stripe: int, stripes: int, index: Any) -> Array:
    """Find the last position of a device's own that each token sees.

    Args:
        position_T: int32 positions of the request; -1 is padding.
        stripe: positions of a stripe.
        stripes: devices that share a page.
        index: of the device among them.

    Returns:
        int32 [T], counted among the positions that the device stores; -1 sees none.
    """
    page = stripe * stripes
    within_T = jnp.clip(position_T % page - index * stripe + 1, 0, stripe)
    return jnp.where(position_T >= 0, position_T // page * stripe + within_T - 1, -1)
