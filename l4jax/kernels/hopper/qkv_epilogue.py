"""Epilogue of the qkv projection in one launch: partial sums, RoPE, norm, scales, write to cache.

Plain XLA makes a launch of the sums, one of the norms, one of their use and one that writes pages,
and reads and writes a prefill's heads in each of them. Here a thread block (one warpgroup) has the
queries, the key and the value of one token and one kv head, eight rows at a time in registers:

    load 8 rows of every part, sum, scale | RoPE | norm | temperature | cache scales | store 8 rows
    ... next 8 rows ...                   | key row and value row -> their page

Grid: tokens x kv heads. Shared memory: G + 2 rows rounded up to a multiple of 8, x 128 x 4 bytes:
4,096 bytes for Scout's 7 rows. From there the key and the value are read back for their page.

Letters: P parts of the matmul, S slots, of which the tokens are the first; U rows of a kv head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

from l4jax.kernels.formats import saturating_cast
from l4jax.kernels.hopper.mosaic import (
    EIGHT_ROWS,
    TILING_ROWS,
    broadcast_rows,
    inline_mgpu,
    load_row,
    stack_rows,
)
from l4jax.kernels.reference import HeadTransform


@functools.partial(jax.jit, static_argnames="interpret")
def write_heads(
    parts_PSKJH: Array,
    scale_S: Array | None,
    scale_KJH: Array | None,
    transform: HeadTransform,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    *,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """Compute `reference.transform_heads`, and `reference.store` in place.

    Args:
        parts_PSKJH: split-K partial products of the projection: for each kv head the queries, the
            key and the value, 128 wide.
        scale_S, scale_KJH: float32 scales of the sums; None without.
        transform, k_PKZH, v_PKZH, table_RB, row_T, position_T: as for `reference.attend`.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [T, K, U, H]: the rows of each kv head as they are attended and stored, padded with
        finite values to a multiple of 8. And the pool's arrays with the writes done.
    """
    parts, _, kv_heads, rows, head_dim = parts_PSKJH.shape
    (tokens,), (pages, _, page, _) = row_T.shape, k_PKZH.shape
    height, key_row = -(-rows // TILING_ROWS) * TILING_ROWS, rows - 2
    operands = _list_operands(scale_S, scale_KJH, transform, table_RB, row_T, position_T)
    pools = jax.new_ref(k_PKZH), jax.new_ref(v_PKZH)  # written in place, without a copy

    def qkv_epilogue_kernel(x: Any, *flat: Any, rows_smem: Any) -> None:
        refs = dict(zip(operands, flat, strict=False))
        *pool_refs, out = flat[len(operands) :]
        token, head = lax.axis_index("token"), lax.axis_index("head")
        # The loads of position and page are in flight while the rows are transformed.
        position = refs["position"][token]
        column = jnp.clip(lax.div(position, page), 0, table_RB.shape[1] - 1)
        page_id = refs["table"][refs["row"][token], column]

        def load_sum(row: int) -> Array:
            loaded = [load_row(x.at[p, token, head, row]) for p in range(parts)]
            row_H = functools.reduce(jnp.add, (part_H.astype(jnp.float32) for part_H in loaded))
            return row_H * load_row(refs["columns"].at[head, row]) if "columns" in refs else row_H

        for first in range(0, height, TILING_ROWS):
            shape, last = (TILING_ROWS, head_dim), min(first + TILING_ROWS, rows)
            row_8H = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=EIGHT_ROWS)
            x_8H = stack_rows([load_sum(row) for row in range(first, last)])
            x_8H = _transform_rows(x_8H, row_8H, refs, transform, token, key_row, interpret)
            out[token, head, pl.ds(first, TILING_ROWS)] = x_8H.astype(jnp.bfloat16)
            rows_smem[pl.ds(first, TILING_ROWS)] = x_8H

        @pl.when((position >= 0) & (page_id >= 0) & (page_id < pages))
        def _write_to_cache() -> None:
            for row, pool in enumerate(pool_refs, key_row):
                pool[page_id, head, lax.rem(position, page)] = saturating_cast(
                    rows_smem[row], pool.dtype
                )

    kernel = plgpu.kernel(
        qkv_epilogue_kernel,
        out_type=jax.ShapeDtypeStruct((tokens, kv_heads, height, head_dim), jnp.bfloat16),
        grid=(tokens, kv_heads),
        grid_names=("token", "head"),
        scratch_types=dict(rows_smem=plgpu.SMEM((height, head_dim), jnp.float32)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    x_TKUH = kernel(parts_PSKJH, *operands.values(), *pools)
    return x_TKUH, pools[0][...], pools[1][...]


def _list_operands(
    scale_S: Array | None,
    scale_KJH: Array | None,
    transform: HeadTransform,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
) -> dict[str, Array]:
    """List the kernel's small inputs by name, without those that this layer lacks."""
    operands = {"table": table_RB, "row": row_T, "position": position_T}
    if scale_S is not None:
        operands["scale"] = scale_S
    if scale_KJH is not None:
        operands["columns"] = scale_KJH
    if transform.angle_TH is not None:
        angle_TH = jnp.repeat(transform.angle_TH, 2, axis=1)  # one for each element of a pair
        sign_H = np.tile(np.array([-1, 1], np.float32), angle_TH.shape[1] // 2)
        operands |= {"cos": jnp.cos(angle_TH), "sin": jnp.sin(angle_TH) * sign_H}
    if transform.factor_T is not None:
        operands["factor"] = transform.factor_T
    if transform.scales is not None:
        scales = jnp.stack(transform.scales)
        operands["cache_scales"] = scales.astype(jnp.bfloat16).astype(jnp.float32)
    return operands


def _transform_rows(
    x_8H: Array,
    row_8H: Array,
    refs: dict[str, Any],
    transform: HeadTransform,
    token: Any,
    key_row: int,
    interpret: Any,
) -> Array:
    """Transform eight summed rows, and round to bfloat16 wherever the definition does."""
    shape = x_8H.shape
    x_8H = _round(x_8H * refs["scale"][token] if "scale" in refs else x_8H)
    qk_8H = x_8H
    if "cos" in refs:
        cos, sin = (stack_rows([load_row(refs[name].at[token])]) for name in ("cos", "sin"))
        qk_8H = _round(qk_8H * cos + _swap_pairs(qk_8H, interpret) * sin)
    if transform.eps is not None:
        mean = jnp.sum(qk_8H * qk_8H, axis=1) * (1 / shape[1])
        qk_8H = _round(qk_8H * broadcast_rows(lax.rsqrt(mean + transform.eps), shape))
    if "factor" in refs:
        qk_8H = jnp.where(row_8H < key_row, _round(qk_8H * refs["factor"][token]), qk_8H)
    x_8H = jnp.where(row_8H <= key_row, qk_8H, x_8H)
    if "cache_scales" in refs:
        k_scale, v_scale = refs["cache_scales"][0], refs["cache_scales"][1]
        divided = x_8H / jnp.where(row_8H == key_row, k_scale, v_scale)
        x_8H = _round(jnp.where(row_8H < key_row, x_8H * k_scale, divided))
    return x_8H


def _round(x: Array) -> Array:
    """Round to bfloat16, in float32."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _swap_pairs(x: Array, interpret: Any) -> Array:
    """Swap each pair of neighbors, both of which one thread has."""
    if interpret is not None:
        return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)

    @inline_mgpu(
        arg_types=(EIGHT_ROWS,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, EIGHT_ROWS),
    )
    def swap(_: Any, x: Any) -> Any:
        registers = np.empty_like(x.registers)
        for at, eight in np.ndenumerate(x.registers):
            registers[at] = vector.shuffle(eight, eight, [1, 0, 3, 2, 5, 4, 7, 6])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return swap(x)
