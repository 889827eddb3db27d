"""Attention over the page pool: chunk-local with RoPE, or global without.

A local layer sees the aligned chunk of its token, `k <= q and k // chunk == q // chunk`. Positions
count within the chunk, so this is plain causal attention with RoPE angles below `chunk` radians.
RoPE is relative, so the scores are the same; float32 angles are exact to 4e-4 at any context
length.

The scores, the softmax and the values are in `kernels.reference.attend_pages`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from l4jax import axes
from l4jax.cache import Batch
from l4jax.config import TextConfig
from l4jax.kernels import Kernels
from l4jax.kernels.reference import HeadTransform, Norm
from l4jax.model.layers import declare
from l4jax.model.rope import compute_angles, scale_frequencies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Positions of a step's tokens, and their page tables, for one group of layers."""

    absolute_T: Array
    position_T: Array  # within the table: absolute, or within the chunk; -1 is padding
    row_T: Array
    table_RB: Array

    @classmethod
    def of(cls, batch: Batch, config: TextConfig, group: int) -> "Positions":
        """Select the positions and the page table of a layer group."""
        at_T = batch.position_T
        if config.is_nope(group):
            return cls(at_T, at_T, batch.row_T, batch.tables.global_RB)
        within_T = jnp.where(at_T >= 0, at_T % config.chunk, -1)
        return cls(at_T, within_T, batch.row_T, batch.tables.local_GRB[group])


class Attention(nn.Module):
    """Grouped-query attention of one layer; it returns the pool with keys and values written."""

    config: TextConfig
    is_nope: bool
    kernels: Kernels

    @nn.compact
    def __call__(
        self,
        x_TD: Array,
        norm: Norm | None,
        k_PKZH: Array,
        v_PKZH: Array,
        positions: Positions,
        scales: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        c = self.config
        # For each kv head the queries, the key and the value: one matmul, sharded by kv head.
        qkv_KJHD = declare(
            self,
            "qkv",
            (c.kv_heads, c.queries + 2, c.head_dim, c.width),
            (axes.KV_HEADS, axes.QUERIES_KV, axes.HEAD_DIM, axes.WIDTH),
        )
        out_DKGH = declare(
            self,
            "out",
            (c.width, c.kv_heads, c.queries, c.head_dim),
            (axes.WIDTH, axes.KV_HEADS, axes.QUERIES, axes.HEAD_DIM),
        )
        transform = self.make_head_transform(positions, scales)
        tables = (positions.table_RB, positions.row_T, positions.position_T)
        attend = self.kernels.attend
        if self.is_nope and self.kernels.attend_global is not None:
            attend = self.kernels.attend_global
        y_TKGH, k_PKZH, v_PKZH = attend(x_TD, norm, qkv_KJHD, transform, k_PKZH, v_PKZH, *tables)
        y_TD = self.kernels.multiply("TKGH,DKGH->TD", y_TKGH, out_DKGH)
        return y_TD, k_PKZH, v_PKZH

    def make_head_transform(
        self, positions: Positions, scales: tuple[Array, Array] | None
    ) -> HeadTransform:
        """Make the transform of heads: RoPE and a norm in local layers, a temperature in global."""
        c = self.config
        if not self.is_nope:
            frequency_H = scale_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
            angle_TH = compute_angles(positions.position_T, frequency_H)
            return HeadTransform(angle_TH, eps=c.norm_eps if c.has_qk_norm else None, scales=scales)
        if not c.has_temperature_tuning:
            return HeadTransform(scales=scales)
        factor_T = compute_temperature(positions.absolute_T, c.floor_scale, c.attn_scale)
        return HeadTransform(factor_T=factor_T, scales=scales)


def compute_temperature(position_T: Array, floor_scale: int, attn_scale: float) -> Array:
    """Compute the factor of a global layer's queries: [T] float32, 1 in the first `floor_scale`
    positions.

    The arithmetic is float32: in bfloat16 the position itself is first wrong at 8176.
    """
    steps_T = jnp.floor((position_T.astype(jnp.float32) + 1) / floor_scale)
    return 1 + attn_scale * jnp.log1p(steps_T)
