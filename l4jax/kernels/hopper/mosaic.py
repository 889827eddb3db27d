"""Building blocks of the Mosaic GPU kernels: layouts, shared memory, registers, row loads."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

load: Any = plgpu.load  # parameters differ between jax versions
inline_mgpu: Any = plgpu.inline_mgpu  # its type declares no arguments

WARPS = 4  # of a warpgroup
THREADS = 32 * WARPS  # of a warpgroup
WGMMA_ROWS = 64  # M of a wgmma instruction
SWIZZLE_BYTES = 128  # bytes of a row that are swizzled together
TILING_ROWS = 8  # rows of a shared-memory tile
VECTOR = 8  # elements per load of a thread: 16 bytes of bfloat16, the largest load
PRODUCER_REGISTERS = 40  # per thread of a producer warpgroup

BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a wgmma accumulator
# Eight rows, two per warp; a thread reads eight neighbors at once.
EIGHT_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (2, 128), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def count_bits(dtype: Any) -> int:
    """Return the bits of an element in memory."""
    return 4 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize * 8


def count_registers(compute_warpgroups: int) -> int:
    """Return the registers per thread of compute warpgroups with one producer warpgroup.

    A thread block launches with the same number for each thread, a multiple of eight. A warpgroup
    that asks for more than the producer gives back waits for ever.
    """
    warpgroups = compute_warpgroups + 1
    launched = 65536 // (THREADS * warpgroups) // 8 * 8
    spare = launched * warpgroups - PRODUCER_REGISTERS
    return min(232, spare // compute_warpgroups // 8 * 8)


def allocate_swizzled(shape: tuple[int, ...], dtype: Any, swizzle: int = SWIZZLE_BYTES) -> Any:
    """Declare shared memory tiled and swizzled for TMA and wgmma.

    Args:
        shape: of the array.
        dtype: of its elements.
        swizzle: bytes of a line; the last axis is a multiple of it.
    """
    line = swizzle * 8 // count_bits(dtype)  # elements
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(
            plgpu.TilingTransform((TILING_ROWS, line)),
            plgpu.SwizzleTransform(swizzle),
        ),
    )


def broadcast_rows(x_M: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast one value per row along the row."""
    return lax.broadcast_in_dim(x_M, shape, [0])


def load_row(ref: Any) -> Array:
    """Load one row in the layout that `stack_rows` takes."""
    return load(ref, layout=EIGHT_ROWS.reduce(0), optimized=False)


def stack_rows(rows: list[Array]) -> Array:
    """Stack up to eight rows; missing rows repeat the first one."""
    shape = (8, *rows[0].shape)
    row_8 = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=EIGHT_ROWS)
    stacked, *others = (
        plgpu.layout_cast(lax.broadcast_in_dim(row, shape, [1]), EIGHT_ROWS) for row in rows
    )
    for place, row in enumerate(others, 1):
        stacked = jnp.where(row_8 == place, row, stacked)
    return stacked
