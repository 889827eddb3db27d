"""Training kernels: complete documents in one step, without a KV cache.

The model is that of `l4jax.model`; only its kernels differ. `attend` sees the keys and values of
the step and no pool, within the rows that `l4jax.train.batches` packs. A page table of B columns
means that its layers attend over B blocks of `chunk` tokens; its entries hold a segment's first
segment of the same document.
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
    """Make the differentiable kernels of a model with this attention chunk.

    Args:
        chunk: the model's attention chunk, in tokens.
        attention: "xla" on any device, or "cudnn" on a GPU, in bfloat16 only.
    """
    return Kernels(
        attend=functools.partial(attend, chunk=chunk, attention=attention),
        attend_all=functools.partial(_attend_all, attention=attention),
        run_experts=reference.run_experts,
    )


def make_remat_kernels(chunk: int, attention: str = "xla") -> Kernels:
    """Make the same kernels with rematerialization: the backward pass recomputes activations."""
    kernels = make_training_kernels(chunk, attention)
    return dataclasses.replace(
        kernels,
        attend=jax.checkpoint(kernels.attend),
        run_experts=jax.checkpoint(kernels.run_experts),
        mix_experts=jax.checkpoint(kernels.mix_experts),
    )


def make_empty_pool(config: TextConfig) -> PagePool:
    """Make an empty page pool, which `attend` does not read."""
    empty = tuple(jnp.zeros(()) for _ in range(count_arrays(config)))
    return PagePool(empty, empty)


def _attend_all(q_IPNH: Array, k_IPNH: Array, v_IPNH: Array, *, attention: str) -> Array:
    if attention != "cudnn":
        return reference.attend_all(q_IPNH, k_IPNH, v_IPNH)
    images, patches, *_ = q_IPNH.shape
    # cuDNN differentiates even lengths only.
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
    head_transform: reference.HeadTransform,
    k_pool: Array,
    v_pool: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    *,
    chunk: int,
    attention: Any = "xla",
) -> tuple[Array, Array, Array]:
    """Compute causal attention of each token within its document, or its chunk of the document.

    The tokens are split into spans of B * chunk tokens: a row of the batch in a global layer, a
    block in a local one. Within a span a token attends to earlier tokens with the same first
    segment. Softmax in float32. The output of padding, at position -1, is undefined.

    Args:
        x_TD, norm, qkv_KJHD, head_transform: as for `reference.project_heads`.
        k_pool, v_pool: of `make_empty_pool`, returned unchanged.
        table_RB: the first segment of each segment's document (or the segment), in every column.
        row_T: int32 segment of each token.
        position_T: int32; -1 is padding.
        chunk: the model's attention chunk, in tokens.
        attention: see `make_training_kernels`.
    """
    q_TKGH, k_TKH, v_TKH = reference.project_heads(x_TD, norm, qkv_KJHD, head_transform)
    tokens, kv_heads, queries, head_dim = q_TKGH.shape
    span = table_RB.shape[1] * chunk
    # Each padding token attends to itself only, so that no softmax is empty.
    document_T = jnp.where(position_T >= 0, table_RB[row_T, 0], -1 - jnp.arange(tokens))
    document_NS = document_T.reshape(-1, span)
    slot_S = jnp.arange(span)
    is_visible_NSs = (document_NS[:, :, None] == document_NS[:, None, :]) & (
        slot_S[:, None] >= slot_S
    )
    y_NShH = jax.nn.dot_product_attention(
        q_TKGH.reshape(-1, span, kv_heads * queries, head_dim),
        k_TKH.reshape(-1, span, kv_heads, head_dim),
        v_TKH.reshape(-1, span, kv_heads, head_dim),
        mask=is_visible_NSs[:, None],
        implementation=attention,
    )
    return y_NShH.reshape(q_TKGH.shape), k_pool, v_pool
