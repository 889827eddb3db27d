"""Accelerations in plain XLA, for every device: their cost grows with the real context length."""

import jax.numpy as jnp
from jax import Array, lax

from l4jax.kernels import reference
from l4jax.kernels.formats import Weight
from l4jax.kernels.reference import HeadTransform, Norm

_TOKENS = 64  # tokens of one row that attend together
_POSITIONS = 256  # cached positions read at once


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
    """Compute `reference.attend` with the blocked `attend_pages` of this module."""
    heads = reference.project_heads(x_TD, norm, qkv_KJHD, transform)
    return attend_heads(heads, transform, k_PKZH, v_PKZH, table_RB, row_T, position_T)


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
    """Compute `reference.attend_part` with the blocked `attend_pages` of this module."""
    heads = reference.project_heads(x_TD, norm, qkv_KJHD, transform)
    return attend_heads_part(heads, k_PKZH, v_PKZH, table_RB, row_T, position_T, stored_T)


def attend_heads(
    heads: tuple[Array, Array, Array],
    transform: HeadTransform,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
) -> tuple[Array, Array, Array]:
    """Store keys and values, then attend: `attend` from the result of `transform_heads` on."""
    y_TKGH, _, k_PKZH, v_PKZH = attend_heads_part(
        heads, k_PKZH, v_PKZH, table_RB, row_T, position_T, stored_T=position_T
    )
    return transform.restore(y_TKGH.astype(heads[0].dtype)), k_PKZH, v_PKZH


def attend_heads_part(
    heads: tuple[Array, Array, Array],
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    stored_T: Array,
) -> tuple[Array, Array, Array, Array]:
    """Store keys and values, then attend: `attend_part` from the result of `transform_heads` on."""
    q_TKGH, k_TKH, v_TKH = heads
    k_PKZH, v_PKZH = reference.store(k_PKZH, v_PKZH, k_TKH, v_TKH, table_RB, row_T, stored_T)
    y_TKGH, lse_TKG = attend_pages(q_TKGH, k_PKZH, v_PKZH, table_RB, row_T, position_T)
    return y_TKGH, lse_TKG, k_PKZH, v_PKZH


def attend_pages(
    q_TKGH: Array, k_PKZH: Array, v_PKZH: Array, table_RB: Array, row_T: Array, position_T: Array
) -> tuple[Array, Array]:
    """Compute `reference.attend_pages` by an online softmax over blocks of pages.

    The loop ends at the last block of the longest row. Tokens are cut into items of up to 64
    neighbors of one row, which share a read of its pages. In a decode step each token is an item.
    """
    tokens, kv_heads, _, head_dim = q_TKGH.shape
    page, (rows, width) = k_PKZH.shape[2], table_RB.shape
    block = 1 if tokens == rows else min(_TOKENS, tokens)
    columns = max(1, min(_POSITIONS // page, width))  # table columns per block
    item_T, token_IU, is_real_IU = _cut(row_T, rows, block)

    q_IUKGH = q_TKGH[token_IU].astype(jnp.float32) * head_dim**-0.5
    position_IU = jnp.where(is_real_IU, position_T[token_IU], -1)
    # Pad to whole blocks of columns: no token sees a position beyond the table's end.
    table_IB = jnp.pad(table_RB, ((0, 0), (0, -width % columns)))[row_T[token_IU[:, 0]]]
    slots = jnp.arange(columns * page)

    def read(pages_PKZH: Array, at: Array) -> Array:
        """Read one block of each item's positions: [I, K, S, H] float32."""
        read_IBKZH = pages_PKZH[lax.dynamic_slice_in_dim(table_IB, at * columns, columns, axis=1)]
        return (
            read_IBKZH.swapaxes(1, 2)
            .reshape(-1, kv_heads, columns * page, head_dim)
            .astype(jnp.float32)
        )

    def attend_block(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak_IUKG, total_IUKG, sum_IUKGH = carry
        is_visible_IUS = at * columns * page + slots <= position_IU[..., None]
        score_IUKGS = jnp.einsum("IUKGH,IKSH->IUKGS", q_IUKGH, read(k_PKZH, at))
        score_IUKGS = jnp.where(is_visible_IUS[:, :, None, None], score_IUKGS, -jnp.inf)
        new_peak_IUKG = jnp.maximum(peak_IUKG, score_IUKGS.max(-1))
        weight_IUKGS = jnp.exp(score_IUKGS - new_peak_IUKG[..., None])
        rescale_IUKG = jnp.exp(peak_IUKG - new_peak_IUKG)
        # Keep values that some token of the item sees: the others may be nan, and 0 * nan is nan.
        is_read_IS = is_visible_IUS.any(axis=1)
        v_IKSH = jnp.where(is_read_IS[:, None, :, None], read(v_PKZH, at), 0)
        added_IUKGH = jnp.einsum("IUKGS,IKSH->IUKGH", weight_IUKGS, v_IKSH)
        return (
            new_peak_IUKG,
            total_IUKG * rescale_IUKG + weight_IUKGS.sum(-1),
            sum_IUKGH * rescale_IUKG[..., None] + added_IUKGH,
        )

    # The initial peak is finite, so that a token that sees no position gives 0 / tiny and not nan.
    peak = jnp.full(q_IUKGH.shape[:-1], jnp.finfo(jnp.float32).min)
    blocks = position_T.max() // (columns * page) + 1
    peak_IUKG, total_IUKG, sum_IUKGH = lax.fori_loop(
        0, blocks, attend_block, (peak, jnp.zeros_like(peak), jnp.zeros_like(q_IUKGH))
    )
    total_IUKG = jnp.maximum(total_IUKG, 1e-30)
    out_IUKGH = sum_IUKGH / total_IUKG[..., None]
    lse_IUKG = peak_IUKG + jnp.log(total_IUKG)
    place_T = jnp.arange(tokens) - token_IU[item_T, 0]
    return out_IUKGH[item_T, place_T], lse_IUKG[item_T, place_T]


def _cut(row_T: Array, rows: int, block: int) -> tuple[Array, Array, Array]:
    """Cut the tokens into items of at most `block` neighbors that share a row.

    Returns:
        item_T: the item of each token.
        token_IU: the tokens of each item, the first one at index 0.
        is_real_IU: whether that token belongs to the item; false is padding.
    """
    tokens = row_T.shape[0]
    at_T = jnp.arange(tokens)
    is_first_T = (at_T % block == 0) | (row_T != jnp.roll(row_T, 1))
    item_T = jnp.cumsum(is_first_T) - 1
    # Each row, and the padding after the last, starts at most one item out of step with blocks.
    items = tokens if block == 1 else -(-tokens // block) + rows + 1
    first_I = jnp.full(items, tokens).at[item_T].min(at_T)
    token_IU = first_I[:, None] + jnp.arange(block)
    inside_IU = jnp.minimum(token_IU, tokens - 1)
    is_real_IU = (token_IU < tokens) & (item_T[inside_IU] == jnp.arange(items)[:, None])
    return item_T, inside_IU, is_real_IU
