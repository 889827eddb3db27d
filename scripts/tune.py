"""Time the tiles that `l4jax/kernels/tiles.py` chooses from, on the Hopper GPU that is there.

    python -m scripts.tune --format fp8 --tokens 1 8 32 128 8192

prints, for Scout's two expert products and each number of tokens, every way to cut them with the
microseconds that it takes, the best first. What is best goes into the tables of `tiles.py`.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.kernels.blocks import Tiles, count_bits, multiply_blocks
from l4jax.kernels.routing import assign_slots, count_blocks
from l4jax.kernels.tiles import choose_slots, choose_tiles

EXPERTS, PRODUCTS = 16, {"gate and up": (16384, 5120), "down": (5120, 8192)}
DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int4": jnp.int4}
TURNS = 8  # of one call, each with other experts, so that none is found in L2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", default="fp8", choices=DTYPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 8192])
    args = parser.parse_args()
    sms = getattr(jax.devices()[0], "core_count", None)
    if sms is None:
        print("scripts.tune: jax finds no GPU; tiles are measured on one.", file=sys.stderr)
        return 1
    cases = [(name, tokens) for name in PRODUCTS for tokens in args.tokens]
    for name, tokens in cases:
        found, (rows, columns) = [], PRODUCTS[name]
        for tiles in list_tiles(DTYPES[args.format], tokens, rows, columns, sms):
            run = make_run(DTYPES[args.format], tokens, rows, columns, tiles, sms)
            try:
                found.append((measure(run), tiles))
            except ValueError as error:  # it asks for more shared memory than there is
                print(f"{tiles}: {str(error).splitlines()[0]}", file=sys.stderr)
        print(f"{args.format}, {name}, {tokens} tokens")
        for seconds, tiles in sorted(found, key=lambda pair: pair[0]):
            print(f"  {seconds * 1e6:9.1f} us  {tiles}")
    return 0


def list_tiles(dtype: Any, tokens: int, rows: int, columns: int, sms: int) -> Iterator[Tiles]:
    """What is chosen now, and what differs from it in one or two ways."""
    slots = choose_slots(tokens, EXPERTS)
    blocks = count_blocks(tokens, EXPERTS, slots)
    live = max(EXPERTS * (1 - (1 - 1 / EXPERTS) ** tokens), tokens / slots)
    now = choose_tiles(dtype, slots, rows, columns, blocks=blocks, live=live, sms=sms)
    assert now is not None
    depths, widths = (now.depth // 2, now.depth, 2 * now.depth), (1, 4, 8)
    for depth, splits, width in itertools.product(depths, (1, 2, 4, 8, 16), widths):
        stages = max(2, now.stages * now.depth // depth)
        is_whole = columns % (depth * splits) == 0
        # A row of what is copied is at least 128 bytes, or a group of int4.
        if is_whole and depth * count_bits(dtype) >= (512 if dtype == jnp.int4 else 1024):
            yield dataclasses.replace(now, depth=depth, splits=splits, width=width, stages=stages)


def make_run(dtype: Any, tokens: int, rows: int, columns: int, tiles: Tiles, sms: int) -> Any:
    """A call of TURNS products, with its arguments."""
    slots, is_int4, is_wide = (
        choose_slots(tokens, EXPERTS),
        dtype == jnp.int4,
        dtype == jnp.bfloat16,
    )
    key = jax.random.key(0, impl="rbg")
    shape = (EXPERTS, rows, columns)
    bits = jax.random.randint(key, shape, -7, 8, jnp.int8)
    weights = (bits.astype(dtype),)
    groups = (columns // 128,) if is_int4 else ()
    scales = () if is_wide else (jnp.ones((*shape[:2], *groups), jnp.float32),)
    expert_T = jnp.asarray(np.random.default_rng(0).integers(0, EXPERTS, tokens), jnp.int32)
    where = assign_slots(expert_T, EXPERTS, slots)
    x_ITU = jax.random.normal(key, (where.expert_I.shape[0], slots, columns), jnp.float32)
    x_ITU = x_ITU.astype(jnp.bfloat16 if is_int4 else dtype)

    @jax.jit
    def run(x_ITU: Any, weights: Any, scales: Any) -> list[jax.Array]:
        experts = [(where.expert_I + turn) % EXPERTS for turn in range(TURNS)]
        options: Any = {"tiles": tiles, "dtype": jnp.bfloat16, "sms": sms}
        return [
            multiply_blocks(x_ITU, weights, scales, expert_I, where.count, **options)
            for expert_I in experts
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
