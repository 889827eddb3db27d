"""Fused row kernels between two matmuls: norm, quantization, activation, merge of attention splits.

Each is one launch, where plain XLA makes two or three. In a decode step of one token a launch costs
more than its work. A row is read once, stays in registers, and is written once:

    grid        one thread block per row
    warpgroup   a share of the row; one warp per line of the share
    reduction   warp shuffles in a line -> partial_smem [value, share, warp] -> barrier `ready`
                -> every warp reduces all partial results in pairs

    warpgroup 0  load share 0, reduce | arrive, wait | reduce partials, scale, store share 0
    warpgroup 1  load share 1, reduce | arrive, wait | reduce partials, scale, store share 1

Few rows leave the device empty, and latency is the cost: hence the shares. Without a reduction each
share is a thread block of its own. Many rows fill the device by themselves, and warpgroups that
wait for each other are then the cost (`heuristics.choose_row_tiling`).

Shared memory: values x shares x 4 warps x 4 bytes and a barrier. `quantize_rows` with a norm at
width 5,120 reduces two values over 5 shares: 160 bytes.

Letters: S slots, O columns of the previous matmul's output, U columns that the next matmul
contracts, W warps of a warpgroup, L elements of a line.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.formats import FP8, compute_fp8_scale
from l4jax.kernels.hopper.heuristics import choose_row_tiling
from l4jax.kernels.hopper.mosaic import VECTOR, WARPS, load
from l4jax.kernels.reference import Norm

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    unsafe_no_auto_barriers=True,
)


@functools.partial(jax.jit, static_argnames="interpret")
def normalize_rows(x_TU: Array, norm: Norm, *, interpret: Any = None) -> Array:
    """Compute `reference.normalize` of bfloat16 rows."""
    rows, width = x_TU.shape

    def normalize_kernel(x: Any, scale: Any, out: Any, partial_smem: Any, ready: Any) -> None:
        row, share = lax.axis_index("row"), lax.axis_index("share")
        x_WL, weight = load_lines(x.at[row, share]), load_lines(scale.at[share])
        square_W = jnp.sum(x_WL * x_WL, axis=1)
        (square,) = _reduce_row(share, (square_W, jnp.add), partial_smem=partial_smem, ready=ready)
        # Round before the weight and after it, as the definition does.
        normed = (x_WL * lax.rsqrt(square * (1 / width) + norm.eps)).astype(jnp.bfloat16)
        out[row, share] = (normed.astype(jnp.float32) * weight).astype(out.dtype)

    tiling = choose_row_tiling(width, rows)
    operands = x_TU.reshape(rows, *tiling), norm.scale_D.reshape(tiling)
    return _launch(normalize_kernel, *operands, rows=rows, out=(rows, *tiling), interpret=interpret)


@functools.partial(jax.jit, static_argnames=("slots", "has_shared", "interpret"))
def quantize_rows(
    x_TU: Array,
    norm: Norm | None = None,
    slot_T: Array | None = None,
    *,
    slots: int,
    has_shared: bool = False,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Compute `formats.quantize_tokens`, and write each token to its slot.

    The norm's division by the root mean square goes into the token's scale.

    Args:
        x_TU: tokens.
        norm: applied to the tokens first.
        slot_T: int32 slot of each token; None where these are the first ones in order.
        slots: number of slots.
        has_shared: whether the tokens are written to the first slots in order, too.
        interpret: as for the other kernels.

    Returns:
        e4m3 [S, U], and the float32 scale of each token.
    """
    tokens, width = x_TU.shape
    tiling = choose_row_tiling(width, tokens)
    operands = {
        "slot": slot_T,
        "weight": None if norm is None else norm.scale_D.reshape(tiling),
    }
    operands = {name: x for name, x in operands.items() if x is not None}

    def quantize_kernel(x: Any, *flat: Any, partial_smem: Any, ready: Any) -> None:
        refs, (out, scales) = dict(zip(operands, flat, strict=False)), flat[len(operands) :]
        token, share = lax.axis_index("row"), lax.axis_index("share")
        x_WL, sums = load_lines(x.at[token, share]), []
        if norm is not None:
            sums = [(jnp.sum(x_WL * x_WL, axis=1), jnp.add)]
            x_WL *= load_lines(refs["weight"].at[share])
        data, scale, *squares = _quantize_share(
            x_WL, share, *sums, partial_smem=partial_smem, ready=ready
        )
        if norm is not None:
            scale *= lax.rsqrt(squares[0] * (1 / width) + norm.eps)
        if "slot" in refs:
            out[refs["slot"][token], share] = data
        if has_shared or "slot" not in refs:
            out[token, share] = data
        _write_once(scales, token, scale, share)

    return _launch(
        quantize_kernel,
        x_TU.reshape(tokens, *tiling),
        *operands.values(),
        rows=tokens,
        out=(slots, *tiling),
        scales=tokens,
        reductions=1 if norm is None else 2,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("has_shared", "is_quantized", "interpret"))
def activate_rows(
    parts_PSO: Array,
    scale_T: Array | None = None,
    gate_T: Array | None = None,
    scale_O: Array | None = None,
    slot_T: Array | None = None,
    *,
    has_shared: bool = False,
    is_quantized: bool,
    interpret: Any = None,
) -> Any:
    """Sum partial products and compute `silu(gate) * up`; O = 2 U with the gates first.

    Args:
        parts_PSO: split-K partial products.
        scale_T, scale_O: float32 scales of the sums, None without. There may be more scales than
            tokens.
        gate_T: float32 gates of the router, None without. They scale the expert's input, and the
            matmul is linear in it.
        slot_T: int32 slot of each token; None where the tokens are in order.
        has_shared: whether the first slots hold the tokens, too; no gate scales them there.
        is_quantized: whether to quantize to e4m3, with a scale per slot.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [S, U]; or e4m3 [S, U] and float32 [S]. Slots without a token are undefined.
    """
    parts, slots, outs = parts_PSO.shape
    half = outs // 2
    tokens = slots if slot_T is None else len(slot_T)
    rows = tokens * (2 if has_shared else 1)
    # With column scales a thread reads as much for half as many elements.
    max_shares = 2 if scale_O is None else 1
    tiling = choose_row_tiling(half, rows, max_shares) if is_quantized else choose_row_tiling(half)
    operands = {
        "slot": slot_T,
        "scale": scale_T,
        "gate": gate_T,
        "columns": None if scale_O is None else scale_O.reshape(2, *tiling),
    }
    operands = {name: x for name, x in operands.items() if x is not None}

    def activate_kernel(x: Any, *flat: Any, **exchange: Any) -> None:
        row, share = lax.axis_index("row"), lax.axis_index("share")
        refs, out = dict(zip(operands, flat, strict=False)), flat[len(operands) :]
        token, slot = _locate(row, tokens, refs.get("slot"), has_shared)
        scale = refs["scale"][token] if "scale" in refs else None
        if "gate" in refs:
            gate = jnp.where(row < rows - tokens, 1.0, refs["gate"][token])
            scale = gate if scale is None else scale * gate

        def load_sum(which: int) -> Array:
            total = load_lines(x.at[0, slot, which, share])
            for part in range(1, parts):
                total += load_lines(x.at[part, slot, which, share])
            if scale is not None:
                total *= scale
            if "columns" not in refs:
                return total
            return total * load_lines(refs["columns"].at[which, share])

        gate, up = load_sum(0), load_sum(1)  # both loads in flight before the first use
        # Round once to bfloat16, as the output of the other matmuls is.
        hidden = (gate * (1 / (1 + jnp.exp(-gate))) * up).astype(jnp.bfloat16)
        if is_quantized:
            out[0][slot, share], fp8_scale = _quantize_share(
                hidden.astype(jnp.float32), share, **exchange
            )
            _write_once(out[1], slot, fp8_scale, share)
        else:
            out[0][slot, share] = hidden

    return _launch(
        activate_kernel,
        parts_PSO.reshape(parts, slots, 2, *tiling),
        *operands.values(),
        rows=rows,
        out=(slots, *tiling),
        reductions=1 if is_quantized else 0,
        scales=slots if is_quantized else 0,
        interpret=interpret,
    )


def _locate(row: Any, tokens: int, slot_T: Any, has_shared: bool) -> tuple[Any, Any]:
    """Return the token and the slot of a work row; with shared slots the first rows take those."""
    if slot_T is None:
        return row, row
    if not has_shared:
        return row, slot_T[row]
    token = lax.rem(row, tokens)
    return token, jnp.where(row < tokens, row, slot_T[token])


@functools.partial(jax.jit, static_argnames="interpret")
def merge_splits(parts: Array, peaks: Array, totals: Array, *, interpret: Any = None) -> Array:
    """Merge attention over splits of the positions, by the softmax of each split.

    Args:
        parts: float32 [splits, T, K, G, H], not divided by the totals.
        peaks, totals: float32 [splits, T, K, G..] of each split's softmax, in powers of two.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [T * K * G, H].
    """
    splits, tokens, kv_heads, heads, head_dim = parts.shape

    def merge_kernel(part: Any, peak: Any, total: Any, out: Any) -> None:
        row, share = lax.axis_index("row"), lax.axis_index("share")
        head, at = lax.rem(row, heads), lax.div(row, heads)
        index = lax.div(at, kv_heads), lax.rem(at, kv_heads), head
        loaded = [load_lines(part.at[p, *index, share]) for p in range(splits)]
        split_peaks = [peak[p, *index] for p in range(splits)]
        top = functools.reduce(jnp.maximum, split_peaks)
        weights = [jnp.exp2(x - top) for x in split_peaks]
        total_weight = sum(w * total[p, *index] for p, w in enumerate(weights))
        merged = sum(w * x for w, x in zip(weights, loaded, strict=True))
        out[row, share] = (merged / jnp.maximum(total_weight, 1e-30)).astype(jnp.bfloat16)

    rows, tiling = tokens * kv_heads * heads, choose_row_tiling(head_dim)
    return _launch(
        merge_kernel,
        parts.reshape(*parts.shape[:-1], *tiling),
        peaks,
        totals,
        rows=rows,
        out=(rows, *tiling),
        reductions=0,
        interpret=interpret,
    )


def load_lines(ref: Any) -> Array:
    """Load a share of a row, [W, L], as float32: one line per warp."""
    vector = math.gcd(ref.shape[-1] // 32, VECTOR)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS, 32 * vector), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    return load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _reduce_row(share: Any, *values: tuple[Array, Any], partial_smem: Any, ready: Any) -> list[Any]:
    """Reduce values of each warp over the row, each with its operation; once in a kernel.

    Nothing else may be reduced over warps: Pallas would use shared memory that all warpgroups have
    in common.
    """
    for at, (value_W, _) in enumerate(values):
        partial_smem[at, share] = value_W
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)
    _, shares, warps = partial_smem.shape

    def reduce_all(at: int, combine: Any) -> Any:
        loaded = [partial_smem[at, other, warp] for other in range(shares) for warp in range(warps)]
        while len(loaded) > 1:  # in pairs: in a chain each operation would wait for the one before
            pairs = itertools.zip_longest(loaded[::2], loaded[1::2])
            loaded = [one if other is None else combine(one, other) for one, other in pairs]
        return loaded[0]

    return [reduce_all(at, combine) for at, (_, combine) in enumerate(values)]


def _quantize_share(
    x_WL: Array, share: Any, *values: tuple[Array, Any], **exchange: Any
) -> list[Any]:
    """Quantize a share; return its e4m3 data, the scale of its row, and other reduced values."""
    amax, *others = _reduce_row(
        share, (jnp.max(jnp.abs(x_WL), axis=1), jnp.maximum), *values, **exchange
    )
    scale = compute_fp8_scale(amax)
    # No clip: a value slightly above the largest e4m3 is rounded to it.
    return [(x_WL * (1 / scale)).astype(FP8), scale, *others]


def _write_once(ref: Any, at: Any, value: Any, share: Any) -> None:
    @pl.when(share == 0)
    def _() -> None:
        ref[at] = value


def _launch(
    body: Any,
    *operands: Array,
    rows: int,
    out: tuple[int, ...],
    reductions: int = 1,
    scales: int = 0,
    interpret: Any,
) -> Any:
    """Launch a body on each share of each row.

    Args:
        body: the kernel.
        operands: its inputs.
        rows: thread blocks, or with no reduction rows of them.
        out: shape of the output, in shares: bfloat16, or e4m3 with scales.
        reductions: values reduced over a row. With any, the shares are warpgroups of one thread
            block, with shared memory and a barrier to exchange partial results.
        scales: number of float32 scales; 0 without.
        interpret: as for the other kernels.
    """
    out_rows, *tiling = out
    out_types = [jax.ShapeDtypeStruct(out, FP8 if scales else jnp.bfloat16)]
    if scales:
        out_types.append(jax.ShapeDtypeStruct((scales,), jnp.float32))
    launch: Any = dict(grid=(rows, tiling[0]), grid_names=("row", "share"))
    if reductions:
        launch = dict(
            grid=(rows,),
            grid_names=("row",),
            num_threads=tiling[0],
            thread_name="share",
            scratch_types=dict(
                partial_smem=plgpu.SMEM((reductions, *tiling[:2]), jnp.float32),
                ready=plgpu.Barrier(num_arrivals=tiling[0]),
            ),
        )
    kernel = plgpu.kernel(
        body, out_type=out_types, compiler_params=COMPILER_PARAMS, interpret=interpret, **launch
    )
    result, *result_scales = kernel(*operands)
    result = result.reshape(out_rows, -1)
    return (result, *result_scales) if scales else result
