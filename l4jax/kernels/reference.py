"""The definitions: what each kernel computes, in the plainest JAX that says it, on any device.

Every acceleration is tested against these. They spend memory and arithmetic freely.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from l4jax.kernels.formats import Weight, multiply, saturating_cast


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale_D"], meta_fields=["eps"])
@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm, through which tokens are read: `normalize`.

    Attributes:
        scale_D: a weight per channel.
        eps: what is added to the mean square.
    """

    scale_D: Any
    eps: float


def normalize(x_TD: Array, norm: Norm | None) -> Array:
    """Tokens as they are read through a norm; without one as they are."""
    return x_TD if norm is None else divide_by_rms(x_TD, norm.eps) * norm.scale_D


def divide_by_rms(x_D: Array, eps: float) -> Array:
    """Divide the last axis by its root mean square, in float32; back in the dtype of x."""
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
    """What a layer does to heads between their projection and attention, in this order.

    Attributes:
        angle_TH: [T, H / 2] float32, by which queries and keys are turned; None without RoPE.
        eps: of the norm of each query and key behind that; None without one.
        factor_T: float32, what queries are multiplied by.
        scales: float32 scalars, what keys and values are divided by where they are stored, and
            what attends to them is multiplied by.
    """

    angle_TH: Any = None
    eps: float | None = None
    factor_T: Any = None
    scales: Any = None

    def restore(self, y_TKGH: Array) -> Array:
        """What attended to values that were divided, multiplied."""
        return y_TKGH if self.scales is None else y_TKGH * self.scales[1].astype(y_TKGH.dtype)


def rotate(x_H: Array, angle_H: Array | np.ndarray) -> Array:
    """Turn each pair of neighbors (2i, 2i+1) of the last axis, [..., H], in float32, by angles that
    broadcast to [..., H / 2]."""
    pair_H2 = x_H.astype(jnp.float32).reshape(*x_H.shape[:-1], -1, 2)
    cos_H, sin_H = jnp.cos(angle_H)[..., None], jnp.sin(angle_H)[..., None]
    # The one of a pair that is not itself: swapped, and not put together anew, which XLA would do
    # in a launch of its own.
    turned_H2 = pair_H2 * cos_H + pair_H2[..., ::-1] * (sin_H * np.array([-1, 1], np.float32))
    return turned_H2.reshape(x_H.shape).astype(x_H.dtype)


def project_heads(
    x_TD: Array,
    norm: Norm | None,
    qkv_KJHD: Weight,
    turn: HeadTransform,
    *,
    multiply: Callable[..., Array] = multiply,
) -> tuple[Array, Array, Array]:
    """The queries [T, K, G, H], keys and values [T, K, H] of tokens, as they meet.

    Args:
        x_TD: the tokens.
        norm: how they are read.
        qkv_KJHD: of each kv head the G queries, the key and the value, in any format.
        turn: what happens to them.
        multiply: what projects, with the signature of `formats.multiply`.
    """
    qkv_TKJH = multiply("TD,KJHD->TKJH", normalize(x_TD, norm), qkv_KJHD)
    qk_TKJH, v_TKH = qkv_TKJH[:, :, :-1], qkv_TKJH[:, :, -1]
    if turn.angle_TH is not None:
        qk_TKJH = rotate(qk_TKJH, turn.angle_TH[:, None, None])
    if turn.eps is not None:
        qk_TKJH = divide_by_rms(qk_TKJH, turn.eps)
    q_TKGH, k_TKH = qk_TKJH[:, :, :-1], qk_TKJH[:, :, -1]
    if turn.factor_T is not None:
        q_TKGH = (q_TKGH * turn.factor_T[:, None, None, None]).astype(x_TD.dtype)
    if turn.scales is not None:
        k_scale, v_scale = (scale.astype(x_TD.dtype) for scale in turn.scales)
        # Scores and sums are linear in what is stored.
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
    """Write each token's key and value into the page that its row's table names.

    Args:
        k_PKZH, v_PKZH: the pool's arrays, returned with the writes done.
        k_TKH, v_TKH: what to write.
        table_RB: int32 pages of each row.
        row_T: int32 row of each token.
        position_T: int32 position of each token as the table counts; -1 writes nothing.
    """
    pages, _, page, _ = k_PKZH.shape
    page_T = table_RB[row_T, position_T // page]
    # Padding goes beyond the pool, where the write is dropped.
    page_T = jnp.where(position_T >= 0, page_T, pages)
    slot_T = position_T % page
    k_PKZH = k_PKZH.at[page_T, :, slot_T].set(saturating_cast(k_TKH, k_PKZH.dtype), mode="drop")
    v_PKZH = v_PKZH.at[page_T, :, slot_T].set(saturating_cast(v_TKH, v_PKZH.dtype), mode="drop")
    return k_PKZH, v_PKZH


def attend_pages(
    q_TKGH: Array, k_PKZH: Array, v_PKZH: Array, table_RB: Array, row_T: Array, position_T: Array
) -> Array:
    """Causal attention of each token over the cached positions 0 .. its own of its row.

    Softmax in float32 over scores scaled by head_dim ** -0.5. A token at position -1 gets zeros.

    Args:
        q_TKGH: queries, G heads to each kv head.
        k_PKZH, v_PKZH: the pool's arrays, this step's tokens already stored.
        table_RB, row_T, position_T: as for `store`; tokens of a row stand in a run, rows ascend.

    Returns:
        [T, K, G, H] in the dtype of the queries.
    """
    head_dim = q_TKGH.shape[-1]
    k_TKSH, v_TKSH = (
        _gather(pages, table_RB[row_T]).astype(q_TKGH.dtype) for pages in (k_PKZH, v_PKZH)
    )
    is_visible_TS = jnp.arange(k_TKSH.shape[2]) <= position_T[:, None]
    score_TKGS = jnp.einsum("TKGH,TKSH->TKGS", q_TKGH, k_TKSH, preferred_element_type=jnp.float32)
    score_TKGS = jnp.where(is_visible_TS[:, None, None], score_TKGS * head_dim**-0.5, -jnp.inf)
    # Beyond a row's length lies what the last owner left: mask values too, since 0 * nan is nan.
    v_TKSH = jnp.where(is_visible_TS[:, None, :, None], v_TKSH, 0)
    weight_TKGS = jax.nn.softmax(score_TKGS, axis=-1, where=is_visible_TS[:, None, None])
    return jnp.einsum(
        "TKGS,TKSH->TKGH", weight_TKGS.astype(q_TKGH.dtype), v_TKSH.astype(q_TKGH.dtype)
    )


def _gather(pages_PKZH: Array, table_TB: Array) -> Array:
    """The cached positions of each token's row, in order: [T, K, S, H]."""
    _, kv_heads, page, head_dim = pages_PKZH.shape
    tokens, width = table_TB.shape
    found_TKBZH = pages_PKZH[table_TB].swapaxes(1, 2)
    return found_TKBZH.reshape(tokens, kv_heads, width * page, head_dim)


def attend(
    x_TD: Array,
    norm: Norm | None,
    qkv_KJHD: Weight,
    turn: HeadTransform,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    *,
    read: Callable[..., Array] = attend_pages,
    multiply: Callable[..., Array] = multiply,
) -> tuple[Array, Array, Array]:
    """Find this step's heads, store its keys and values, then attend: see `project_heads`, `store`
    and `attend_pages`.

    Args:
        read: what attends, with the signature of `attend_pages`; the others are for these.
        multiply: as for `project_heads`.

    Returns:
        What `attend_pages` returns, and the pool's arrays with the writes done.
    """
    where = (table_RB, row_T, position_T)
    q_TKGH, k_TKH, v_TKH = project_heads(x_TD, norm, qkv_KJHD, turn, multiply=multiply)
    k_PKZH, v_PKZH = store(k_PKZH, v_PKZH, k_TKH, v_TKH, *where)
    y_TKGH = read(q_TKGH, k_PKZH, v_PKZH, *where)
    return turn.restore(y_TKGH), k_PKZH, v_PKZH


def attend_all(q_IPNH: Array, k_IPNH: Array, v_IPNH: Array) -> Array:
    """Full attention within each of I images, of every patch to every patch; softmax in float32."""
    score_INPQ = jnp.einsum("IPNH,IQNH->INPQ", q_IPNH, k_IPNH, preferred_element_type=jnp.float32)
    weight_INPQ = jax.nn.softmax(score_INPQ * q_IPNH.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("INPQ,IQNH->IPNH", weight_INPQ.astype(q_IPNH.dtype), v_IPNH)


def route(x_TD: Array, norm: Norm | None, router_ED: Weight) -> tuple[Array, Array, Array]:
    """Tokens, read through a norm, and the experts.

    Returns:
        Each token's scores, [T, E]; the best-scored expert, [T] int32, the first of equal ones; and
        the sigmoid of its score, [T] float32: the gate that scales its input.
    """
    score_TE = multiply("TD,ED->TE", normalize(x_TD, norm), router_ED)
    expert_T = jnp.argmax(score_TE, axis=-1).astype(jnp.int32)
    # The sigmoid of the largest, taken before the maximum: one launch for both.
    return score_TE, expert_T, jax.nn.sigmoid(score_TE.astype(jnp.float32)).max(axis=-1)


def run_experts(
    x_TD: Array, norm: Norm | None, expert_T: Array, gate_up_EcFD: Weight, down_EDF: Weight
) -> Array:
    """Each token through its own expert: `down @ (silu(gate @ x) * (up @ x))`.

    Args:
        x_TD: the tokens, already scaled by their router's gate.
        norm: how they are read.
        expert_T: int32 expert of each token.
        gate_up_EcFD: gate (c = 0) and up (c = 1) matrices of all experts, in any format.
        down_EDF: down matrices of all experts.
    """
    experts = jnp.arange(gate_up_EcFD.shape[0])
    x_TD = normalize(x_TD, norm)
    # An expert maps zeros to zeros, so what it is not asked for it does not add to.
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
) -> Array:
    """`shared(x) + expert(gate * x)`: the expert that all tokens share, and each token's own.

    Args:
        x_TD: the tokens.
        norm: how they are read.
        expert_T: int32 expert of each token.
        gate_T: float32, what scales the input of that expert.
        gate_up_EcFD, down_EDF: as for `run_experts`.
        shared_gate_up_cFD, shared_down_DF: of the shared expert, in the same format.
    """
    alone_T = jnp.zeros_like(expert_T)
    shared = jax.tree.map(lambda w: w[None], (shared_gate_up_cFD, shared_down_DF))
    x_TD = normalize(x_TD, norm)
    scaled_TD = x_TD * gate_T[:, None].astype(x_TD.dtype)
    routed_TD = run_experts(scaled_TD, None, expert_T, gate_up_EcFD, down_EDF)
    return run_experts(x_TD, None, alone_T, *shared) + routed_TD
