"""Kernels for training: whole documents in one step, nothing cached.

The model is that of `l4jax.model`; only what it calls differs. `attend` sees the step's own keys
and values and no pool, within the rows that `l4jax.train.batches` packs. A table of B columns says
that its layers see B blocks of `chunk` tokens together; its entries name the run that begins what a
run belongs to.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from l4jax.cache import PagePool, count_arrays
from l4jax.config import TextConfig
from l4jax.kernels import Kernels, reference
from l4jax.kernels.formats import Weight


def make_training_kernels(chunk: int, attention: str = "xla") -> Kernels:
    """The bundle for a model with this attention chunk. All of it can be differentiated.

    Args:
        chunk: of the model.
        attention: what computes it, "xla" anywhere or "cudnn" on a GPU, in bfloat16 alone.
    """
    return Kernels(
        attend=functools.partial(attend, chunk=chunk, attention=attention),
        attend_all=functools.partial(_attend_all, attention=attention),
        run_experts=reference.run_experts,
    )


def make_lean_kernels(chunk: int, attention: str = "xla") -> Kernels:
    """The same, keeping nothing of what they do for the way back, where it is computed again."""
    kernels = make_training_kernels(chunk, attention)
    return dataclasses.replace(
        kernels,
        attend=jax.checkpoint(kernels.attend),
        run_experts=jax.checkpoint(kernels.run_experts),
        mix_experts=jax.checkpoint(kernels.mix_experts),
    )


def make_no_pool(config: TextConfig) -> PagePool:
    """What stands in a pool's place: `attend` looks at none of it."""
    nothing = tuple(jnp.zeros(()) for _ in range(count_arrays(config)))
    return PagePool(nothing, nothing)


def _attend_all(q_IPNH: Array, k_IPNH: Array, v_IPNH: Array, *, attention: str) -> Array:
    if attention != "cudnn":
        return reference.attend_all(q_IPNH, k_IPNH, v_IPNH)
    images, patches, *_ = q_IPNH.shape
    # It differentiates even lengths alone.
    padding = ((0, 0), (0, patches % 2), (0, 0), (0, 0))
    length_I = jnp.full(images, patches, jnp.int32)
    y_IPNH = jax.nn.dot_product_attention(
        *(jnp.pad(x, padding) for x in (q_IPNH, k_IPNH, v_IPNH)),
        query_seq_lengths=length_I,
        key_value_seq_lengths=length_I,
        implementation="cudnn",
    )
    return y_IPNH[:, :patches]


def attend(
    x_TD: Array,
    norm: reference.Norm | None,
    qkv_KJHD: Weight,
    turn: reference.HeadTransform,
    k_pool: Array,
    v_pool: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    *,
    chunk: int,
    attention: Any = "xla",
) -> tuple[Array, Array, Array]:
    """Causal attention of each token within its own document, or its own chunk of it.

    The tokens are cut into spans of B * chunk, those that a row of the batch (a global layer) or a
    block (a local one) holds; within a span a token sees those before it whose first run is its
    own. Softmax in float32. What comes out for padding, at position -1, means nothing.

    Args:
        x_TD, norm, qkv_KJHD, turn: as for `reference.project_heads`.
        k_pool, v_pool: of `make_no_pool`, returned as they are.
        table_RB: the first run of each run's document (or the run itself), in every column.
        row_T: int32 run of each token.
        position_T: int32; -1 is padding.
        chunk: of the model.
        attention: see `make_training_kernels`.
    """
    q_TKGH, k_TKH, v_TKH = reference.project_heads(x_TD, norm, qkv_KJHD, turn)
    tokens, kv_heads, queries, head_dim = q_TKGH.shape
    span = table_RB.shape[1] * chunk
    # Padding belongs to nobody, and sees itself, so that no softmax is empty.
    owner_T = jnp.where(position_T >= 0, table_RB[row_T, 0], -1 - jnp.arange(tokens))
    owner_NS = owner_T.reshape(-1, span)
    slot_S = jnp.arange(span)
    is_visible_NSs = (owner_NS[:, :, None] == owner_NS[:, None, :]) & (slot_S[:, None] >= slot_S)
    y_NShH = jax.nn.dot_product_attention(
        q_TKGH.reshape(-1, span, kv_heads * queries, head_dim),
        k_TKH.reshape(-1, span, kv_heads, head_dim),
        v_TKH.reshape(-1, span, kv_heads, head_dim),
        mask=is_visible_NSs[:, None],
        implementation=attention,
    )
    return y_NShH.reshape(q_TKGH.shape), k_pool, v_pool
