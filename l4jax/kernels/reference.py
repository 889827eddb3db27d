"""Definitions: each kernel in the plainest JAX that states its result, on any device.

Every acceleration is tested against these. They spend memory and arithmetic freely.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from l4jax.kernels.formats import Weight, multiply, saturating_cast


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale_D"], meta_fields=["eps"])
@dataclasses.dataclass(frozen=True)
class Norm:
    """Parameters of an RMSNorm, which `normalize` applies.

    Attributes:
        scale_D: weight per channel.
        eps: added to the mean square.
    """

    scale_D: Any
    eps: float


def normalize(x_TD: Array, norm: Norm | None) -> Array:
    """Apply an RMSNorm to tokens; return them unchanged where it is None."""
    return x_TD if norm is None else divide_by_rms(x_TD, norm.eps) * norm.scale_D


def divide_by_rms(x_D: Array, eps: float) -> Array:
    """Divide the last axis by its root mean square, in float32; return the dtype of x."""
    x32_D = x_D.astype(jnp.float32)
    mean_square = jnp.mean(x32_D * x32_D, axis=-1, keepdims=True)
    return (x32_D * jax.lax.rsqrt(mean_square + eps)).astype(x_D.dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["angle_TH", "factor_T", "scales"],
    meta_fields=["eps"],
)
@dataclasses.dataclass(frozen=True)
class HeadTransform:
    """Transforms of heads between their projection and attention, applied in this order.

    Attributes:
        angle_TH: [T, H / 2] float32, RoPE angles of queries and keys; None without RoPE.
        eps: of the norm of each query and key after RoPE; None without this norm.
        factor_T: float32, temperature that multiplies queries; None without it.
        scales: two float32 scalars, of the cached keys and values: both are divided by their scale
            before they are stored; None where the cache has no scales.
    """

    angle_TH: Any = None
    eps: float | None = None
    factor_T: Any = None
    scales: Any = None

    def restore(self, y_TKGH: Array) -> Array:
        """Undo the value scale on the attention output."""
        return y_TKGH if self.scales is None else y_TKGH * self.scales[1].astype(y_TKGH.dtype)


def embed(token_T: Array, embedding_VD: Array, first: Array | int = 0) -> Array:
    """Look up embeddings [T, D]: zeros for tokens outside the table.

    Args:
        token_T: int32 tokens.
        embedding_VD: a part of the vocabulary.
        first: the token of the part's first row.
    """
    at_T = token_T - first
    is_here_T = (at_T >= 0) & (at_T < len(embedding_VD))
    x_TD = embedding_VD[jnp.clip(at_T, 0, len(embedding_VD) - 1)]
    return jnp.where(is_here_T[:, None], x_TD, 0)


def rotate(x_H: Array, angle_H: Array | np.ndarray) -> Array:
    """Apply RoPE: rotate each pair of neighbors (2i, 2i+1) of the last axis, in float32.

    Args:
        x_H: [..., H].
        angle_H: float32 radians, broadcast to [..., H / 2].
    """
    pair_H2 = x_H.astype(jnp.float32).reshape(*x_H.shape[:-1], -1, 2)
    cos_H, sin_H = jnp.cos(angle_H)[..., None], jnp.sin(angle_H)[..., None]
    # Reverse the pair for its partner: XLA would concatenate the halves in a launch of its own.
    rotated_H2 = pair_H2 * cos_H + pair_H2[..., ::-1] * (sin_H * np.array([-1, 1], np.float32))
    return rotated_H2.reshape(x_H.shape).astype(x_H.dtype)


def project_heads(
    x_TD: Array, norm: Norm | None, qkv_KJHD: Weight, transform: HeadTransform
) -> tuple[Array, Array, Array]:
    """Project tokens to queries [T, K, G, H], keys and values [T, K, H], as attention reads them.

    Args:
        x_TD: tokens.
        norm: applied to the tokens first.
        qkv_KJHD: for each kv head the G queries, the key and the value, in any format.
        transform: applied to the heads.
    """
    qkv_TKJH = multiply("TD,KJHD->TKJH", normalize(x_TD, norm), qkv_KJHD)
    return transform_heads(qkv_TKJH, transform)


def transform_heads(qkv_TKJH: Array, transform: HeadTransform) -> tuple[Array, Array, Array]:
    """Apply RoPE, the norm, the temperature and the cache's scales to projected heads.

    Returns:
        Queries [T, K, G, H], keys and values [T, K, H], in the dtype of the heads.
    """
    dtype = qkv_TKJH.dtype
    qk_TKJH, v_TKH = qkv_TKJH[:, :, :-1], qkv_TKJH[:, :, -1]
    if transform.angle_TH is not None:
        qk_TKJH = rotate(qk_TKJH, transform.angle_TH[:, None, None])
    if transform.eps is not None:
        qk_TKJH = divide_by_rms(qk_TKJH, transform.eps)
    q_TKGH, k_TKH = qk_TKJH[:, :, :-1], qk_TKJH[:, :, -1]
    if transform.factor_T is not None:
        q32_TKGH = q_TKGH.astype(jnp.float32) * transform.factor_T[:, None, None, None]
        q_TKGH = q32_TKGH.astype(dtype)
    if transform.scales is not None:
        k_scale, v_scale = (scale.astype(dtype) for scale in transform.scales)
        # Scores are linear in the keys, so queries take the key scale back; `restore` undoes the
        # value scale on the output.
        k_TKH, v_TKH, q_TKGH = k_TKH / k_scale, v_TKH / v_scale, q_TKGH * k_scale
    return q_TKGH, k_TKH, v_TKH


def store(
    k_PKZH: Array,
    v_PKZH: Array,
    k_TKH: Array,
    v_TKH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
) -> tuple[Array, Array]:
    """Write each token's key and value to the cache page that its row's table names.

    Args:
        k_PKZH, v_PKZH: the pool's arrays.
        k_TKH, v_TKH: new keys and values.
        table_RB: int32 page ids of each row.
        row_T: int32 row of each token.
        position_T: int32 position of each token within its row's table; -1 writes nothing.

    Returns:
        The pool's arrays with the writes done.
    """
    pages, _, page, _ = k_PKZH.shape
    page_T = table_RB[row_T, position_T // page]
    # Padding gets a page id beyond the pool, whose write is dropped.
    page_T = jnp.where(position_T >= 0, page_T, pages)
    slot_T = position_T % page
    k_PKZH = k_PKZH.at[page_T, :, slot_T].set(saturating_cast(k_TKH, k_PKZH.dtype), mode="drop")
    v_PKZH = v_PKZH.at[page_T, :, slot_T].set(saturating_cast(v_TKH, v_PKZH.dtype), mode="drop")
    return k_PKZH, v_PKZH


def attend(
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
    """Project this step's heads, store its keys and values, then attend to the cache.

    Args:
        x_TD, norm, qkv_KJHD, transform: as for `project_heads`.
        k_PKZH, v_PKZH, table_RB, row_T, position_T: as for `store`.

    Returns:
        The attention output [T, K, G, H], and the pool's arrays with the writes done.
    """
    tables = (table_RB, row_T, position_T)
    y_TKGH, _, k_PKZH, v_PKZH = attend_part(
        x_TD, norm, qkv_KJHD, transform, k_PKZH, v_PKZH, *tables, stored_T=position_T
    )
    return transform.restore(y_TKGH.astype(x_TD.dtype)), k_PKZH, v_PKZH


def attend_part(
    x_TD: Array,
    norm: Norm | None,
    qkv_KJHD: Weight,
    transform: HeadTransform,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    stored_T: Array,
) -> tuple[Array, Array, Array, Array]:
    """Attend to a part of the cached positions; the parts' outputs are merged afterwards.

    Args:
        x_TD, norm, qkv_KJHD, transform: as for `project_heads`.
        k_PKZH, v_PKZH, table_RB, row_T: as for `store`.
        position_T: int32 last position of the part that each token sees; -1 sees none.
        stored_T: int32 position at which each token is stored; -1 is stored in another part.

    Returns:
        The output [T, K, G, H] float32, its value scale not undone; the log-sum-exp of the scores
        [T, K, G] float32, near float32's minimum without a position; the pool's arrays.
    """
    q_TKGH, k_TKH, v_TKH = project_heads(x_TD, norm, qkv_KJHD, transform)
    k_PKZH, v_PKZH = store(k_PKZH, v_PKZH, k_TKH, v_TKH, table_RB, row_T, stored_T)
    y_TKGH, lse_TKG = attend_pages(q_TKGH, k_PKZH, v_PKZH, table_RB, row_T, position_T)
    return y_TKGH, lse_TKG, k_PKZH, v_PKZH


def attend_pages(
    q_TKGH: Array, k_PKZH: Array, v_PKZH: Array, table_RB: Array, row_T: Array, position_T: Array
) -> tuple[Array, Array]:
    """Compute causal attention of each token over its row's cached positions, 0 up to its own.

    Scores are scaled by head_dim ** -0.5; the softmax is float32. Tokens at position -1 get zeros.

    Args:
        q_TKGH: queries, G heads per kv head.
        k_PKZH, v_PKZH: the pool's arrays, this step's tokens already stored.
        table_RB, row_T, position_T: as for `store`; the tokens of a row are contiguous, and rows
            ascend.

    Returns:
        The output [T, K, G, H] float32, and the log-sum-exp of the scores [T, K, G] float32.
    """
    head_dim = q_TKGH.shape[-1]
    k_TKSH, v_TKSH = (
        _gather(pages, table_RB[row_T]).astype(q_TKGH.dtype) for pages in (k_PKZH, v_PKZH)
    )
    is_visible_TS = jnp.arange(k_TKSH.shape[2]) <= position_T[:, None]
    score_TKGS = jnp.einsum("TKGH,TKSH->TKGS", q_TKGH, k_TKSH, preferred_element_type=jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    score_TKGS = jnp.where(is_visible_TS[:, None, None], score_TKGS * head_dim**-0.5, lowest)
    # Positions beyond a row's length hold a previous owner's data: mask values too, 0 * nan is nan.
    v_TKSH = jnp.where(is_visible_TS[:, None, :, None], v_TKSH, 0)
    weight_TKGS = jax.nn.softmax(score_TKGS, axis=-1, where=is_visible_TS[:, None, None])
    y_TKGH = jnp.einsum(
        "TKGS,TKSH->TKGH",
        weight_TKGS.astype(q_TKGH.dtype),
        v_TKSH,
        preferred_element_type=jnp.float32,
    )
    return y_TKGH, jax.nn.logsumexp(score_TKGS, axis=-1)


def _gather(pages_PKZH: Array, table_TB: Array) -> Array:
    """Gather the cached positions of each token's row, in order: [T, K, S, H]."""
    _, kv_heads, page, head_dim = pages_PKZH.shape
    tokens, width = table_TB.shape
    gathered_TKBZH = pages_PKZH[table_TB].swapaxes(1, 2)
    return gathered_TKBZH.reshape(tokens, kv_heads, width * page, head_dim)


def attend_all(q_IPNH: Array, k_IPNH: Array, v_IPNH: Array) -> Array:
    """Compute full attention among the patches of each of I image tiles; the softmax is float32."""
    score_INPQ = jnp.einsum("IPNH,IQNH->INPQ", q_IPNH, k_IPNH, preferred_element_type=jnp.float32)
    weight_INPQ = jax.nn.softmax(score_INPQ * q_IPNH.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("INPQ,IQNH->IPNH", weight_INPQ.astype(q_IPNH.dtype), v_IPNH)


def route(x_TD: Array, norm: Norm | None, router_ED: Weight) -> tuple[Array, Array, Array]:
    """Score experts for each token, after a norm, and choose the best one.

    Returns:
        Scores [T, E]; the expert with the highest score, [T] int32, the first of equal ones; and
        the sigmoid of its score, [T] float32: the gate that scales the expert's input.
    """
    score_TE = multiply("TD,ED->TE", normalize(x_TD, norm), router_ED)
    expert_T = jnp.argmax(score_TE, axis=-1).astype(jnp.int32)
    # Take the sigmoid before the maximum: XLA fuses both into one launch.
    return score_TE, expert_T, jax.nn.sigmoid(score_TE.astype(jnp.float32)).max(axis=-1)


def run_experts(
    x_TD: Array,
    norm: Norm | None,
    expert_T: Array,
    gate_up_EcFD: Weight,
    down_EDF: Weight,
    *,
    is_partial: bool = False,
) -> Array:
    """Run each token through its own expert: `down @ (silu(gate @ x) * (up @ x))`.

    Args:
        x_TD: tokens, already scaled by their router's gate.
        norm: applied to the tokens first.
        expert_T: int32 expert of each token.
        gate_up_EcFD: gate (c = 0) and up (c = 1) matrices of all experts, in any format.
        down_EDF: down matrices of all experts.
        is_partial: whether tokens may have an id beyond the experts; their output is zero.
    """
    experts = jnp.arange(gate_up_EcFD.shape[0])
    x_TD = normalize(x_TD, norm)
    # An expert maps zeros to zeros, so a token's other experts add nothing to it.
    x_ETD = jnp.where((experts[:, None] == expert_T)[..., None], x_TD, 0)
    hidden_EcTF = multiply("ETD,EcFD->EcTF", x_ETD, gate_up_EcFD)
    hidden_ETF = jax.nn.silu(hidden_EcTF[:, 0]) * hidden_EcTF[:, 1]
    return multiply("ETF,EDF->ETD", hidden_ETF, down_EDF).sum(axis=0)


def mix_experts(
    x_TD: Array,
    norm: Norm | None,
    expert_T: Array,
    gate_T: Array,
    gate_up_EcFD: Weight,
    down_EDF: Weight,
    shared_gate_up_cFD: Weight,
    shared_down_DF: Weight,
    *,
    is_partial: bool = False,
) -> Array:
    """Compute `shared(x) + expert(gate * x)`: the shared expert and each token's routed expert.

    Args:
        x_TD: tokens.
        norm: applied to the tokens first.
        expert_T: int32 routed expert of each token.
        gate_T: float32, scales the routed expert's input.
        gate_up_EcFD, down_EDF, is_partial: as for `run_experts`.
        shared_gate_up_cFD, shared_down_DF: the shared expert's matrices, in the same format.
    """
    first_T = jnp.zeros_like(expert_T)
    shared = jax.tree.map(lambda w: w[None], (shared_gate_up_cFD, shared_down_DF))
    x_TD = normalize(x_TD, norm)
    scaled_TD = x_TD * gate_T[:, None].astype(x_TD.dtype)
    routed_TD = run_experts(
        scaled_TD, None, expert_T, gate_up_EcFD, down_EDF, is_partial=is_partial
    )
    return run_experts(x_TD, None, first_T, *shared) + routed_TD
