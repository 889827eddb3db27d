"""Time tilings of the grouped matmul on a Hopper GPU, for the tables of `hopper/heuristics.py`.

    python -m scripts.tune --format fp8 --tokens 1 8 32 128 8192 --products up down

prints, for Scout's matmuls and each number of tokens, tilings and their microseconds, the fastest
first. The fastest ones go into the tables of `l4jax/kernels/hopper/heuristics.py`.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.config import INT4_GROUP
from l4jax.kernels.hopper.grouped_matmul import grouped_matmul
from l4jax.kernels.hopper.heuristics import (
    MAX_STAGES,
    SCALES,
    TileConfig,
    choose_slots,
    choose_tile_config,
    estimate_active_blocks,
)
from l4jax.kernels.hopper.mosaic import count_bits
from l4jax.kernels.hopper.slot_assignment import assign_slots, count_blocks

# Experts, rows, columns
PRODUCTS = {
    "up": (16, 16384, 5120),
    "down": (16, 5120, 8192),
    "qkv": (1, 7168, 5120),
    "out": (1, 5120, 5120),
}
STACKED = 16  # matrices in turn: far more than L2 holds
DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int4": jnp.int4}
REPEATS = 8  # matmuls per call, with other experts each, so that none is in L2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", default="fp8", choices=DTYPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 8192])
    parser.add_argument("--products", nargs="+", default=["up", "down"], choices=PRODUCTS)
    args = parser.parse_args()
    sms = getattr(jax.devices()[0], "core_count", None)
    if sms is None:
        print("scripts.tune: jax finds no GPU; tilings are measured on one.", file=sys.stderr)
        return 1
    dtype = DTYPES[args.format]
    for name, tokens in itertools.product(args.products, args.tokens):
        found, sizes = [], PRODUCTS[name]
        for tiles in list_tiles(dtype, tokens, *sizes, sms):
            run = make_run(dtype, tokens, *sizes, tiles, sms)
            try:
                found.append((measure(run), tiles))
            except ValueError as error:  # it asks for more shared memory than there is
                print(f"{tiles}: {str(error).splitlines()[0]}", file=sys.stderr)
        print(f"{args.format}, {name}, {tokens} tokens")
        for seconds, tiles in sorted(found, key=lambda pair: pair[0]):
            print(f"  {seconds * 1e6:9.1f} us  {tiles}")
    return 0


def list_tiles(
    dtype: Any, tokens: int, experts: int, rows: int, columns: int, sms: int
) -> Iterator[TileConfig]:
    """List tilings near the current choice.

    A prefill varies the grid width, a decode step tile_m and the compute warpgroups.
    """
    slots = choose_slots(tokens, experts)
    blocks = count_blocks(tokens, experts, slots)
    active_blocks = estimate_active_blocks(tokens, experts, slots)
    now = choose_tile_config(
        dtype, slots, rows, columns, blocks=blocks, active_blocks=active_blocks, sms=sms
    )
    assert now is not None
    depths, splits = (now.tile_k // 2, now.tile_k, 2 * now.tile_k), (1, 2, 4, 5, 8, 10, 16)
    width = now.grid_width
    if now.split_k == 1 and blocks > 1 and tokens > 1024:
        splits, shapes = (1,), [(now.tile_m, now.compute_warpgroups, w) for w in (1, 4, 8)]
    else:
        shapes = [(64, 1, width), (128, 2, width), (256, 2, width), (256, 4, width)]
    for tile_k, split_k, (tile_m, warpgroups, grid_width) in itertools.product(
        depths, splits, shapes
    ):
        stages = min(MAX_STAGES, now.stages * now.tile_k * now.tile_m // (tile_k * tile_m))
        is_divisible = columns % (tile_k * split_k) == 0 and rows % tile_m == 0
        # A copied row has at least 128 bytes, or a group of int4, whose scales come in fours.
        groups = tile_k // INT4_GROUP if dtype == jnp.int4 else 1
        is_wide = tile_k * count_bits(dtype) >= (512 if dtype == jnp.int4 else 1024)
        if is_divisible and is_wide and stages > 1 and SCALES % groups == 0:
            yield TileConfig(tile_m, tile_k, stages, split_k, grid_width, warpgroups)


def make_run(
    dtype: Any, tokens: int, experts: int, rows: int, columns: int, tiles: TileConfig, sms: int
) -> Any:
    """Return a function that runs REPEATS matmuls with one tiling."""
    slots = choose_slots(tokens, experts)
    is_int4, has_scales = dtype == jnp.int4, dtype != jnp.bfloat16
    key = jax.random.key(0, impl="rbg")
    shape = (STACKED, rows, columns)
    bits = jax.random.randint(key, shape, -7, 8, jnp.int8)
    weights = (bits.astype(dtype),)
    groups = (columns // INT4_GROUP,) if is_int4 else ()
    scales = (jnp.ones((*shape[:2], *groups), jnp.float32),) if has_scales else ()
    expert_T = jnp.asarray(np.random.default_rng(0).integers(0, experts, tokens), jnp.int32)
    assignment = assign_slots(expert_T, experts, slots)
    x_ITU = jax.random.normal(key, (assignment.expert_I.shape[0], slots, columns), jnp.float32)
    x_ITU = x_ITU.astype(jnp.bfloat16 if is_int4 else dtype)

    @jax.jit
    def run(x_ITU: Any, weights: Any, scales: Any) -> list[jax.Array]:
        matrices = [(assignment.expert_I + repeat) % STACKED for repeat in range(REPEATS)]
        options: Any = {"tiles": tiles, "dtype": jnp.bfloat16, "sms": sms}
        return [
            grouped_matmul(x_ITU, weights, scales, matrix_I, assignment.count, **options)
            for matrix_I in matrices
        ]

    return lambda: run(x_ITU, weights, scales)


def measure(run: Any, repeats: int = 5) -> float:
    """Return the seconds of one matmul: the median of a few calls after the first."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - started) / REPEATS)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
