"""Accelerations in plain XLA, for every device: they cost what the real context costs."""

import functools

import jax.numpy as jnp
from jax import Array, lax

from l4jax.kernels import reference

_TOKENS = 64  # of one row, attended together
_POSITIONS = 256  # of the cache, read together


def attend_pages(
    q_TKGH: Array, k_PKZH: Array, v_PKZH: Array, table_RB: Array, row_T: Array, position_T: Array
) -> Array:
    """`reference.attend_pages`, blocked: a softmax carried over blocks of pages, as many as the
    longest row has.

    The tokens are cut into items: up to 64 neighbors of one row, which read that row's pages once.
    In a decode step every token is an item of its own.
    """
    tokens, kv_heads, _, head_dim = q_TKGH.shape
    page, (rows, width) = k_PKZH.shape[2], table_RB.shape
    block = 1 if tokens == rows else min(_TOKENS, tokens)
    columns = max(1, min(_POSITIONS // page, width))  # of the table, read together
    item_T, token_IU, is_real_IU = _cut(row_T, rows, block)

    q_IUKGH = q_TKGH[token_IU].astype(jnp.float32) * head_dim**-0.5
    position_IU = jnp.where(is_real_IU, position_T[token_IU], -1)
    # Whole blocks of columns: the last one may hang over the table's end, where nothing is visible.
    table_IB = jnp.pad(table_RB, ((0, 0), (0, -width % columns)))[row_T[token_IU[:, 0]]]
    slots = jnp.arange(columns * page)

    def read(pages_PKZH: Array, at: Array) -> Array:
        """A block of each item's positions: [I, K, S, H]."""
        found = pages_PKZH[lax.dynamic_slice_in_dim(table_IB, at * columns, columns, axis=1)]
        return (
            found.swapaxes(1, 2).reshape(-1, kv_heads, columns * page, head_dim).astype(jnp.float32)
        )

    def absorb(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak_IUKG, total_IUKG, sum_IUKGH = carry
        is_visible_IUS = at * columns * page + slots <= position_IU[..., None]
        score_IUKGS = jnp.einsum("IUKGH,IKSH->IUKGS", q_IUKGH, read(k_PKZH, at))
        score_IUKGS = jnp.where(is_visible_IUS[:, :, None, None], score_IUKGS, -jnp.inf)
        new_peak_IUKG = jnp.maximum(peak_IUKG, score_IUKGS.max(-1))
        weight_IUKGS = jnp.exp(score_IUKGS - new_peak_IUKG[..., None])
        shrink_IUKG = jnp.exp(peak_IUKG - new_peak_IUKG)
        # Visible to some token of the item: what lies beyond may be nan, and 0 * nan is nan.
        is_read_IS = is_visible_IUS.any(axis=1)
        v_IKSH = jnp.where(is_read_IS[:, None, :, None], read(v_PKZH, at), 0)
        added_IUKGH = jnp.einsum("IUKGS,IKSH->IUKGH", weight_IUKGS, v_IKSH)
        return (
            new_peak_IUKG,
            total_IUKG * shrink_IUKG + weight_IUKGS.sum(-1),
            sum_IUKGH * shrink_IUKG[..., None] + added_IUKGH,
        )

    # A finite floor, so that a token that sees nothing gives 0 / tiny and not nan.
    peak = jnp.full(q_IUKGH.shape[:-1], jnp.finfo(jnp.float32).min)
    blocks = position_T.max() // (columns * page) + 1
    _, total_IUKG, sum_IUKGH = lax.fori_loop(
        0, blocks, absorb, (peak, jnp.zeros_like(peak), jnp.zeros_like(q_IUKGH))
    )
    out_IUKGH = sum_IUKGH / jnp.maximum(total_IUKG, 1e-30)[..., None]
    place_T = jnp.arange(tokens) - token_IU[item_T, 0]
    return out_IUKGH[item_T, place_T].astype(q_TKGH.dtype)


attend = functools.partial(reference.attend, read=attend_pages)


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
    # Each row, and the padding behind the last, starts at most one item out of step with blocks.
    items = tokens if block == 1 else -(-tokens // block) + rows + 1
    first_I = jnp.full(items, tokens).at[item_T].min(at_T)
    token_IU = first_I[:, None] + jnp.arange(block)
    inside_IU = jnp.minimum(token_IU, tokens - 1)
    is_real_IU = (token_IU < tokens) & (item_T[inside_IU] == jnp.arange(items)[:, None])
    return item_T, inside_IU, is_real_IU
