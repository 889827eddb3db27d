"""Small work between two products, a row to a thread block, so that it is one launch each.

A row is read once, stays in registers, and is written once. Plain XLA makes two or three launches
of the same, and in a decode step of one token a launch costs more than what it does.

Letters here: S slots, O what the product before gave, U what the one behind it joins.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.formats import FP8, FP8_MAX, narrow


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def normalize_rows(x_TU: Array, scale_U: Array, *, eps: float, interpret: Any = None) -> Array:
    """`reference.normalize` of bfloat16."""

    def norm_body(x: Any, scale: Any, out: Any) -> None:
        row = lax.axis_index("row")
        found = x[row].astype(jnp.float32)
        mean_square = jnp.sum(found * found) / found.shape[0]
        # Rounded before the weight as behind it, as the definition is.
        normed = (found * lax.rsqrt(mean_square + eps)).astype(jnp.bfloat16)
        out[row] = (normed.astype(jnp.float32) * scale[...].astype(jnp.float32)).astype(out.dtype)

    sizes = {"rows": x_TU.shape[0], "width": x_TU.shape[1]}
    return _launch(norm_body, x_TU, scale_U, **sizes, is_rounded=False, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("plain", "interpret"))
def round_rows(
    x_TU: Array,
    token_S: Array,
    gate_T: Array | None = None,
    *,
    plain: int = 0,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """`formats.quantize_tokens` of the token of each slot, times its gate where there are any: e4m3
    [S, U] and float32 scales [S]. The first `plain` slots take their tokens as they are."""
    gates = () if gate_T is None else (gate_T,)

    def round_body(x: Any, token: Any, *refs: Any) -> None:
        *gate, out, scale = refs
        row = lax.axis_index("row")
        mine = token[row]
        found = x[mine].astype(jnp.float32)
        if gate:
            # The gate and what it scales are bfloat16 in the model.
            factor = jnp.where(row < plain, 1.0, gate[0][mine])
            factor = factor.astype(jnp.bfloat16).astype(jnp.float32)
            found = (found * factor).astype(jnp.bfloat16).astype(jnp.float32)
        _write_rounded(found, out, scale, row)

    sizes = {"rows": token_S.shape[0], "width": x_TU.shape[1]}
    return _launch(round_body, x_TU, token_S, *gates, **sizes, is_rounded=True, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("is_rounded", "interpret"))
def activate_rows(
    parts_PSO: Array,
    scale_S: Array | None = None,
    scale_O: Array | None = None,
    *,
    is_rounded: bool,
    interpret: Any = None,
) -> Any:
    """`silu(gate) * up` of a product's parts, O = 2 U with the gates first.

    Args:
        parts_PSO: the parts, to be added up.
        scale_S, scale_O: float32, what the sums are multiplied by, where they are.
        is_rounded: to e4m3, with a scale for each slot.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [S, U]; or e4m3 and float32 [S].
    """
    parts, slots, outs = parts_PSO.shape
    half = outs // 2
    scales = [scale for scale in (scale_S, scale_O) if scale is not None]

    def activate_body(x: Any, *refs: Any) -> None:
        row = lax.axis_index("row")
        factors, to = list(refs[: len(scales)]), refs[len(scales) :]
        of_slot = factors.pop(0)[row] if scale_S is not None else None

        def read(at: int) -> Array:
            here = pl.ds(at * half, half)
            total = x[0, row, here].astype(jnp.float32)
            for part in range(1, parts):
                total += x[part, row, here].astype(jnp.float32)
            if of_slot is not None:
                total *= of_slot
            return total * factors[0][here] if factors else total

        gate = read(0)
        # Rounded once to bfloat16, as the product of other kernels is.
        found = (gate / (1 + jnp.exp(-gate)) * read(1)).astype(jnp.bfloat16)
        if is_rounded:
            _write_rounded(found.astype(jnp.float32), to[0], to[1], row)
        else:
            to[0][row] = found

    sizes = {"rows": slots, "width": half}
    return _launch(
        activate_body, parts_PSO, *scales, **sizes, is_rounded=is_rounded, interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def store_rows(
    x_TKUH: Array,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    *,
    heads: int,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """`reference.store` in place, of keys and values that stand behind so many queries: row `heads`
    of x is a key, and the next one its value."""
    tokens, kv_heads, *_ = x_TKUH.shape
    pages, _, page, _ = k_PKZH.shape
    columns = table_RB.shape[1]
    pools = jax.new_ref(k_PKZH), jax.new_ref(v_PKZH)  # what the kernel writes to is not copied

    def store_body(x: Any, table: Any, row: Any, position: Any, *to: Any) -> None:
        token, head = lax.axis_index("token"), lax.axis_index("head")
        at = position[token]

        @pl.when(at >= 0)
        def _() -> None:
            found = table[row[token], jnp.minimum(lax.div(at, page), columns - 1)]

            @pl.when((found >= 0) & (found < pages))
            def _() -> None:
                for place, pool in enumerate(to):
                    wide = x[token, head, heads + place].astype(jnp.float32)
                    pool[found, head, lax.rem(at, page)] = narrow(wide, pool.dtype)

    kernel = plgpu.kernel(
        store_body,
        grid=(tokens, kv_heads),
        grid_names=("token", "head"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    kernel(x_TKUH, table_RB, row_T, position_T, *pools)
    return pools[0][...], pools[1][...]


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def join_rows(
    parts: Array, peaks: Array, totals: Array, *, heads: int, interpret: Any = None
) -> Array:
    """Attention over parts of the positions, joined: each part weighs as its softmax did.

    Args:
        parts: float32 [parts, T, K, U, H], not yet divided by the totals.
        peaks, totals: float32 [parts, T, K, U..] of each part's softmax, in powers of two.
        heads: how many of U count.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [T * K * G, H].
    """
    count, tokens, kv_heads, _, head_dim = parts.shape

    def join_body(part: Any, peak: Any, total: Any, out: Any) -> None:
        row = lax.axis_index("row")
        head, at = lax.rem(row, heads), lax.div(row, heads)
        here = lax.div(at, kv_heads), lax.rem(at, kv_heads), head
        found = [peak[p, *here] for p in range(count)]
        top = functools.reduce(jnp.maximum, found)
        weights = [jnp.exp2(x - top) for x in found]
        whole = sum(w * total[p, *here] for p, w in enumerate(weights))
        joined = sum(w * part[p, *here] for p, w in enumerate(weights))
        out[row] = (joined / jnp.maximum(whole, 1e-30)).astype(jnp.bfloat16)

    sizes = {"rows": tokens * kv_heads * heads, "width": head_dim}
    return _launch(join_body, parts, peaks, totals, **sizes, is_rounded=False, interpret=interpret)


def _write_rounded(x_U: Array, out: Any, scale: Any, row: Any) -> None:
    largest = jnp.max(jnp.abs(x_U))
    factor = jnp.where(largest > 0, largest / FP8_MAX, 1.0)
    out[row] = jnp.clip(x_U / factor, -FP8_MAX, FP8_MAX).astype(FP8)
    scale[row] = factor


def _launch(
    body: Any, *operands: Array, rows: int, width: int, is_rounded: bool, interpret: Any
) -> Any:
    rounded = [jax.ShapeDtypeStruct((rows, width), FP8), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    wide = [jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)]
    kernel = plgpu.kernel(
        body,
        out_type=rounded if is_rounded else wide,
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
    found = kernel(*operands)
    return tuple(found) if is_rounded else found[0]
