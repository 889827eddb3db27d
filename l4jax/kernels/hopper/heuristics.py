"""Heuristics: every threshold and tile table of the Hopper kernels, as measured on one H200.

`python -m scripts.tune` times the tiles that the tables choose from.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from l4jax.config import INT4_GROUP
from l4jax.kernels.hopper.mosaic import THREADS, VECTOR, WARPS, count_bits

# Dispatch. Up to 256 tokens one thread block per token is faster than a matmul; with more than 32
# experts the rest of the step would wait for it.
ROUTER_TOKENS = 256
ROUTER_EXPERTS = 32

# Linear.
MEMORY_BOUND_TOKENS = 128  # a dense matmul of no more tokens is bound by reading its weights
RESIDENT_TOKENS = 8  # fp8 matmuls quantize no more tokens themselves, which saves a launch each
# A bfloat16 matrix with at least 8 rows per column, such as the head, is read faster by our kernel.
TALL_RATIO = 8

# Experts: up to 32 tokens the shared expert runs in the launches of the routed ones. int4 allows
# one block only, since each block dequantizes the weights again.
SHARED_EXPERT_TOKENS = 32

# Slot assignment. The one-launch kernel takes up to 256 tokens and 32 experts. Up to 1,024 tokens
# XLA compares each token with each other one: fewer launches than a prefix sum.
SLOT_TOKENS = 256
SLOT_EXPERTS = 32
PAIRWISE_TOKENS = 1024

# Attention.
MAX_ATTENTION_SPLITS = 32
COPY_POSITIONS = 32  # granularity of copies from a row's last page
PAIRED_POSITIONS = 64  # positions per stage where two kv heads share the memory for them

# Row kernels.
MAX_ROW_SHARES = 5  # warpgroups per row: each warp reads the partial result of every other one
FEW_ROWS = 64  # no more rows leave the device empty
ROUTER_WARPGROUPS = 4  # per token
ROUTER_PREFETCH = 4  # experts whose weights each warpgroup has in flight, limited by registers

# Grouped matmul.
FORMATS = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4)  # of weights
SCALES = 4  # float32 int4 scales per copy: no copy is shorter than 16 bytes
MAX_STAGES = 12
_SHARED_BYTES = 227 * 1024  # per SM
_RESERVED_BYTES = 2 * 1024  # per SM, for barriers and the compiler
_MANY_SLOTS = 32  # per block; with more, four compute warpgroups run out of registers
# Resident tokens. Each thread holds its share of them in registers while it quantizes them.
_RESIDENT_BYTES = 48 * 1024
_PREFILL_SLOTS = 1024  # in all blocks; from here on arithmetic is the bound, and not memory

# (tile_m, tile_k, grid_width, compute_warpgroups) by bits of a weight. In a decode step
# dequantizing int4 keeps four warpgroups busy.
_DECODE = {16: (128, 64, 4, 2), 8: (128, 128, 4, 2), 4: (256, 512, 4, 4)}
_PREFILL = {16: (256, 64, 8, 2), 8: (256, 128, 8, 2), 4: (128, 256, 8, 2)}
_MIN_TILE_K = {16: 64, 8: 128, 4: INT4_GROUP}


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tiling of a grouped matmul.

    Attributes:
        tile_m: matrix rows per work item; each compute warpgroup takes an equal multiple of 64.
        tile_k: columns per pipeline stage.
        stages: pipeline stages.
        split_k: parts of the columns, a work item each; the partial products are not yet summed.
        grid_width: blocks whose work items are neighbors in the tile walk: they find the weights
            in L2.
        compute_warpgroups: warpgroups that issue wgmma.
        is_resident: whether every block has all tokens, which stay in shared memory as a whole.
    """

    tile_m: int
    tile_k: int
    stages: int
    split_k: int = 1
    grid_width: int = 1
    compute_warpgroups: int = 2
    is_resident: bool = False


@functools.cache
def choose_tile_config(
    dtype: Any,
    slots: int,
    rows: int,
    columns: int,
    *,
    blocks: int,
    active_blocks: float,
    sms: int,
    can_be_resident: bool = False,
) -> TileConfig | None:
    """Choose the tiling of a grouped matmul; None where the kernel cannot run it.

    Args:
        dtype: of the weights.
        slots: per block.
        rows, columns: of a matrix.
        blocks: allocated.
        active_blocks: expected number of blocks that are multiplied.
        sms: multiprocessors.
        can_be_resident: whether every block has all tokens, so that these may be resident.
    """
    if dtype not in FORMATS:
        return None
    bits = count_bits(dtype)
    is_prefill = blocks * slots >= _PREFILL_SLOTS
    tile_m, tile_k, grid_width, warpgroups = (_PREFILL if is_prefill else _DECODE)[bits]
    if rows % tile_m or (slots > _MANY_SLOTS and warpgroups > 2):
        tile_m, warpgroups = (128, 2) if rows % 128 == 0 else (64, 1)
    if columns % tile_k:
        tile_k = _MIN_TILE_K[bits]
    if rows % tile_m or columns % tile_k or slots % 8:
        return None
    resident = slots * columns * bits // 8  # bytes
    is_resident = (
        can_be_resident and resident <= _RESIDENT_BYTES and columns % (tile_k * warpgroups) == 0
    )
    token_bits = 0 if is_resident else slots * (16 if bits == 4 else bits)
    column = (tile_m * bits + token_bits) // 8  # bytes of both operands
    scales = tile_m * SCALES * 4 if bits == 4 else 0  # bytes per stage
    out = warpgroups * slots * 64 * (2 if is_prefill else 4)  # bytes
    room = _SHARED_BYTES - _RESERVED_BYTES - out - (resident if is_resident else 0)
    if room < 2 * (tile_k * column + scales):
        tile_k = min(tile_k, _MIN_TILE_K[bits])
    stages = min(MAX_STAGES, room // (tile_k * column + scales))
    # A partial product is written and read again in float32; its operands are read once.
    partial_cost = 8 * slots / (columns * bits / 8)
    split_k = 1
    if not is_prefill:
        rounds = active_blocks * (rows // tile_m) / sms
        split_k = _choose_split_k(rounds, columns // tile_k, partial_cost)
    return TileConfig(tile_m, tile_k, stages, split_k, grid_width, warpgroups, is_resident)


def _choose_split_k(rounds: float, steps: int, partial_cost: float) -> int:
    """Choose the split-K factor that balances the work items over the SMs.

    Args:
        rounds: work items per SM without a split.
        steps: pipeline steps of an item.
        partial_cost: cost of writing an item's partial product, relative to reading its weights.
    """

    def estimate_cost(split_k: int) -> float:
        longest = -(-rounds * split_k // 1)
        return longest / (rounds * split_k) * (1 + (partial_cost + 0.2 / steps) * split_k)

    return min((s for s in range(1, steps + 1) if steps % s == 0), key=estimate_cost)


def choose_slots(tokens: int, experts: int) -> int:
    """Choose the slots per block for tokens spread over experts.

    With few experts a block has about twice the slots of their average token count. An expert with
    more tokens gets several blocks, side by side, and its weights are read once more from L2.
    """
    if experts == 1:
        return min(128, -(-tokens // 8) * 8)
    return next((n for n in (8, 16, 32, 64) if tokens <= n * experts // 2), 128)


def estimate_active_blocks(tokens: int, experts: int, slots: int) -> float:
    """Estimate the blocks that have tokens, spread evenly at random over the experts."""
    return max(experts * (1 - (1 - 1 / experts) ** tokens), tokens / slots)


def can_run_router(tokens: int, experts: int, width: int) -> bool:
    """Return whether the router kernel takes these shapes."""
    return can_run_rows(width) and tokens <= ROUTER_TOKENS and experts <= ROUTER_EXPERTS


def can_run_rows(width: int) -> bool:
    """Return whether the row kernels take rows of this width: each thread has equally many."""
    return width % THREADS == 0


def choose_attention_splits(rows: int, kv_heads: int, table_width: int, sms: int) -> int:
    """Choose the splits of a decode token's positions: they fill the device, with whole pages."""
    return max(1, min(MAX_ATTENTION_SPLITS, 2 * sms // (kv_heads * rows), table_width))


def choose_row_tiling(width: int, rows: int = 0, max_shares: int = 1) -> tuple[int, int, int]:
    """Choose how warpgroups tile a row.

    Args:
        width: elements of a row.
        rows: number of rows that need a reduction, 0 without one.
        max_shares: the most shares where the rows fill the device.

    Returns:
        Shares per row, lines per share (one per warp) and elements per line. There are as many
        shares as leave each thread a load of full width.
    """
    full = WARPS * 32 * VECTOR
    most = MAX_ROW_SHARES if rows <= FEW_ROWS else max_shares
    shares = max((n for n in range(2, most + 1) if width % (n * full) == 0), default=1)
    return shares, WARPS, width // (shares * WARPS)
