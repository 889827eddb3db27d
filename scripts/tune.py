"""Time the tiles that `l4jax/kernels/tiles.py` chooses from, on the Hopper GPU that is there.

    python -m scripts.tune --format fp8 --tokens 1 8 32 128 8192 --products up down

prints, for Scout's products and each number of tokens, ways to cut them with the microseconds that
each takes, the best first. What is best goes into the tables of `tiles.py`.
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

from l4jax.kernels.blocks import GROUP, SCALES, Tiles, count_bits, multiply_blocks
from l4jax.kernels.routing import assign_slots, count_blocks
from l4jax.kernels.tiles import MOST_STAGES, choose_slots, choose_tiles

# Experts, rows and columns.
PRODUCTS = {
    "up": (16, 16384, 5120),
    "down": (16, 5120, 8192),
    "qkv": (1, 7168, 5120),
    "out": (1, 5120, 5120),
}
STACKED = 16  # matrices, one after the other: far more than L2 holds
DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int4": jnp.int4}
TURNS = 8  # of one call, each with other experts, so that none is found in L2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", default="fp8", choices=DTYPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 8192])
    parser.add_argument("--products", nargs="+", default=["up", "down"], choices=PRODUCTS)
    args = parser.parse_args()
    sms = getattr(jax.devices()[0], "core_count", None)
    if sms is None:
        print("scripts.tune: jax finds no GPU; tiles are measured on one.", file=sys.stderr)
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
) -> Iterator[Tiles]:
    """What is chosen now, and what differs from it in a few ways: of a prompt in how many blocks
    stand side by side, of a decode step in the rows of a tile."""
    slots = choose_slots(tokens, experts)
    blocks = count_blocks(tokens, experts, slots)
    live = max(experts * (1 - (1 - 1 / experts) ** tokens), tokens / slots)
    now = choose_tiles(dtype, slots, rows, columns, blocks=blocks, live=live, sms=sms)
    assert now is not None
    depths, splits = (now.depth // 2, now.depth, 2 * now.depth), (1, 2, 4, 5, 8, 10, 16)
    if now.splits == 1 and blocks > 1 and tokens > 1024:
        splits, shapes = (1,), [(now.rows, now.multipliers, width) for width in (1, 4, 8)]
    else:
        shapes = [(64, 1, now.width), (128, 2, now.width), (256, 2, now.width), (256, 4, now.width)]
    for depth, split, (height, multipliers, width) in itertools.product(depths, splits, shapes):
        stages = min(MOST_STAGES, now.stages * now.depth * now.rows // (depth * height))
        is_whole = columns % (depth * split) == 0 and rows % height == 0
        # A row of what is copied is at least 128 bytes, or a group of int4; of whose scales four
        # are copied at once.
        groups = depth // GROUP if dtype == jnp.int4 else 1
        is_wide = depth * count_bits(dtype) >= (512 if dtype == jnp.int4 else 1024)
        if is_whole and is_wide and stages > 1 and SCALES % groups == 0:
            yield Tiles(height, depth, stages, split, width, multipliers)


def make_run(
    dtype: Any, tokens: int, experts: int, rows: int, columns: int, tiles: Tiles, sms: int
) -> Any:
    """A call of TURNS products, with its arguments."""
    slots = choose_slots(tokens, experts)
    is_int4, is_wide = dtype == jnp.int4, dtype == jnp.bfloat16
    key = jax.random.key(0, impl="rbg")
    shape = (STACKED, rows, columns)
    bits = jax.random.randint(key, shape, -7, 8, jnp.int8)
    weights = (bits.astype(dtype),)
    groups = (columns // GROUP,) if is_int4 else ()
    scales = () if is_wide else (jnp.ones((*shape[:2], *groups), jnp.float32),)
    expert_T = jnp.asarray(np.random.default_rng(0).integers(0, experts, tokens), jnp.int32)
    where = assign_slots(expert_T, experts, slots)
    x_ITU = jax.random.normal(key, (where.expert_I.shape[0], slots, columns), jnp.float32)
    x_ITU = x_ITU.astype(jnp.bfloat16 if is_int4 else dtype)

    @jax.jit
    def run(x_ITU: Any, weights: Any, scales: Any) -> list[jax.Array]:
        matrices = [(where.expert_I + turn) % STACKED for turn in range(TURNS)]
        options: Any = {"tiles": tiles, "dtype": jnp.bfloat16, "sms": sms}
        return [
            multiply_blocks(x_ITU, weights, scales, matrix_I, where.count, **options)
            for matrix_I in matrices
        ]

    return lambda: run(x_ITU, weights, scales)


def measure(run: Any, repeats: int = 5) -> float:
    """Seconds of one product: the median of a few calls after the first."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - started) / TURNS)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
