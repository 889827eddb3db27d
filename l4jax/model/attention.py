"""Attention over the page pool: chunk-local with RoPE, or global without.

A local layer sees the aligned chunk of its token, `k <= q and k // chunk == q // chunk`. Counting
positions within the chunk makes that plain causal attention, and leaves RoPE's angles below chunk
radians: the scores are the same, since RoPE is relative, and float32 angles stay exact to 4e-4 at
any length of context.
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
from l4jax.model.rope import find_angles, scale_frequencies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the tokens of a step stand, as one group of layers counts."""

    absolute_T: Array
    position_T: Array  # as the table counts: absolute, or within the chunk; -1 is padding
    row_T: Array
    table_RB: Array

    @classmethod
    def of(cls, batch: Batch, config: TextConfig, group: int) -> "Positions":
        at_T = batch.position_T
        if config.is_nope(group):
            return cls(at_T, at_T, batch.row_T, batch.tables.global_RB)
        within_T = jnp.where(at_T >= 0, at_T % config.chunk, -1)
        return cls(at_T, within_T, batch.row_T, batch.tables.local_GRB[group])


class Attention(nn.Module):
    """Grouped-query attention of one layer; its keys and values go into the pool it returns."""

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
        # Of each kv head the queries, the key and the value: one matmul, cut between kv heads.
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
        turn = self.make_head_transform(positions, scales)
        where = (positions.table_RB, positions.row_T, positions.position_T)
        y_TKGH, k_PKZH, v_PKZH = self.kernels.attend(
            x_TD, norm, qkv_KJHD, turn, k_PKZH, v_PKZH, *where
        )
        y_TD = self.kernels.multiply("TKGH,DKGH->TD", y_TKGH, out_DKGH)
        return y_TD, k_PKZH, v_PKZH

    def make_head_transform(
        self, positions: Positions, scales: tuple[Array, Array] | None
    ) -> HeadTransform:
        """What the heads go through: RoPE and a norm in a local layer, a temperature in a global
        one."""
        c = self.config
        if not self.is_nope:
            frequency_H = scale_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
            angle_TH = find_angles(positions.position_T, frequency_H)
            return HeadTransform(angle_TH, eps=c.norm_eps if c.has_qk_norm else None, scales=scales)
        if not c.has_temperature_tuning:
            return HeadTransform(scales=scales)
        factor_T = find_temperature(positions.absolute_T, c.floor_scale, c.attn_scale)
        return HeadTransform(factor_T=factor_T, scales=scales)


def find_temperature(position_T: Array, floor_scale: int, attn_scale: float) -> Array:
    """What the queries of a global layer are multiplied by: [T] float32, 1 in the first
    `floor_scale` positions.

    float32 throughout: in bfloat16 the position itself is first wrong at 8176.
    """
    steps_T = jnp.floor((position_T.astype(jnp.float32) + 1) / floor_scale)
    return 1 + attn_scale * jnp.log1p(steps_T)
