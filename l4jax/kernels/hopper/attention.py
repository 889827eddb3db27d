"""Attention over cache pages on Hopper's tensor cores: prefill chunks, decode tokens and mixes.

The query heads of a kv head share its keys, so they are rows of one matrix: token by token, the
heads of a token side by side. A tile is some of these rows, all of one row of the step. In a decode
step each token is a tile. Where these are few, the positions are split too (flash decoding's
split-K); each split has its own softmax, and `elementwise.merge_splits` merges them. In such a tile
the token's key and value follow its queries, as `qkv_epilogue` writes them; their attention output
is not stored.

It is a persistent kernel: one thread block per SM walks over the work items. Warpgroups are
specialized; keys and values have two pipeline stages each, queries two:

    producer   TMA q | k0 v0 | k1 v1 | wait ek0, k2 | wait ev0, v2 | next item: q ...
    consumer   wait q, fk0: S = Q K0^T, free ek0; softmax; wait fv0: O += P V0, free ev0
                       fk1: S = Q K1^T, ...                              | epilogue
                                             f: full, e: empty barrier of a stage

- A tile of a prefill has 128 query rows: two compute warpgroups, 64 rows each, share its pages.
- A decode tile has one compute warpgroup. Without splits two kv heads share a thread block, a
  warpgroup each, so that one computes while the other waits: they have the same pages.
- e4m3 pages are dequantized in shared memory to float16 and not to bfloat16: the device converts
  in one instruction, float16 holds every e4m3 value, and queries and softmax weights lose nothing.
- A block of positions that even the tile's first query row sees completely needs no mask.

Epilogue: divide by the softmax total and store bfloat16 by TMA; with splits store the float32 sum,
the peak and the total.

Tile walk, innermost first: kv head (or pair of kv heads); split; tile.

Shared memory of a decode step with bfloat16 pages of 128 positions, two kv heads per thread block
(64 positions per stage); in parentheses a prefill (128 positions per stage):

    q_smem         2 stages x 2 x 64 x 128 x 2     65,536 bytes   (the same)
    k_smem         2 stages x 2 x 64 x 128 x 2     65,536         (2 x 128 x 128 x 2 = 65,536)
    v_smem         like k_smem                     65,536         (65,536)
    out_smem       2 warpgroups x 64 x 128 x 2     32,768         (the same)
    softmax_smem   2 warpgroups x 2 x 1 x 4            16         (the same)
                                                  229,392
    launch, with alignment and barriers           231,520 of 232,448 bytes per SM

With e4m3 pages k_smem and v_smem take half, and dequantized_smem, a block per compute warpgroup,
32,768 bytes (65,536 in a prefill).

Letters: I tiles, U query rows of a tile, S positions of a stage.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.formats import FP8
from l4jax.kernels.hopper.elementwise import merge_splits
from l4jax.kernels.hopper.heuristics import (
    COPY_POSITIONS,
    PAIRED_POSITIONS,
    choose_attention_splits,
)
from l4jax.kernels.hopper.mosaic import (
    BY_ROW,
    PRODUCER_REGISTERS,
    TILING_ROWS,
    WGMMA_ROWS,
    allocate_swizzled,
    broadcast_rows,
    count_registers,
    load,
)

_STAGES = 2  # of keys and of values
# The initial peak is below every score, and finite: a row that sees no position gives 0 / tiny and
# not nan.
_INITIAL_PEAK = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Tiles of query rows, int32 each."""

    row_I: Array  # row of the step, which selects the page table
    first_I: Array  # the tile's first query row, counted over the whole step
    offset_I: Array  # position minus token index, for the tokens of the row
    last_I: Array  # position of the tile's last token; -1 sees no position
    stored_I: Array  # position of the row's last token: the cache holds stale data after it
    count: Array | None = None  # [1]: number of tiles in use, the first ones; None: all


def is_supported(dtype: Any, rows: int, k_PKZH: Array) -> bool:
    """Return whether `attend` runs this dtype, rows (G + 2) per kv head, and these pages."""
    page, head_dim = k_PKZH.shape[2:]
    is_known = dtype == jnp.bfloat16 and k_PKZH.dtype in (jnp.bfloat16, FP8)
    return is_known and head_dim == 128 and page in (64, 128) and rows <= WGMMA_ROWS


def attend(
    x_TKUH: Array,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    *,
    heads: int,
    sms: int,
    interpret: Any = None,
) -> Array:
    """Compute the output of `reference.attend_pages`, in the dtype of the heads.

    Args:
        x_TKUH: rows of each kv head, of which the first `heads` are queries.
        k_PKZH, v_PKZH, table_RB, row_T, position_T: as for `reference.attend_pages`.
        heads: query heads per kv head.
        sms: multiprocessors of the device.
        interpret: as for the other kernels.
    """
    launch = functools.partial(_attend_tiles, sms=sms, interpret=interpret)
    rows = table_RB.shape[0]
    tokens, kv_heads, *_ = x_TKUH.shape
    splits = choose_attention_splits(rows, kv_heads, table_RB.shape[1], sms)
    pool = (k_PKZH, v_PKZH, table_RB)
    if tokens == rows:
        return _attend_decode(x_TKUH, pool, row_T, position_T, heads, splits, launch)
    return _attend_mixed(x_TKUH, pool, row_T, position_T, heads, splits, launch)


def _attend_decode(
    x_TKUH: Array, pool: Any, row_T: Array, position_T: Array, heads: int, splits: int, launch: Any
) -> Array:
    """Attend with one tile per token."""
    tokens, kv_heads, _, head_dim = x_TKUH.shape
    at_T = jnp.arange(tokens, dtype=jnp.int32)
    plan = TilePlan(row_T, at_T * heads, position_T - at_T, position_T, position_T)
    out, softmax = launch(x_TKUH, *pool, plan, heads=heads, splits=splits)
    if splits == 1:
        return out
    merged = merge_splits(out, *softmax, interpret=launch.keywords["interpret"])
    return merged.reshape(tokens, kv_heads, heads, head_dim)


def _attend_mixed(
    x_TKUH: Array, pool: Any, row_T: Array, position_T: Array, heads: int, splits: int, launch: Any
) -> Array:
    """Attend with full tiles for prefill chunks, and decode tiles for rows of one token.

    A decode token in a full tile would leave most of it empty.
    """
    rows = pool[2].shape[0]
    chunks = Chunks.find(row_T, position_T, rows)
    is_decode_R = (chunks.count_R == 1) & (rows > 1)
    count_R = jnp.where(is_decode_R, 0, chunks.count_R)
    y_TKGH = _attend_chunks(x_TKUH[:, :, :heads], pool, chunks, count_R, row_T, launch)
    if rows > 1:
        at_R = jnp.where(is_decode_R, chunks.offset_R + chunks.token_R, -1)
        row_R = jnp.arange(rows, dtype=jnp.int32)
        y_RKGH = _attend_decode(x_TKUH[chunks.token_R], pool, row_R, at_R, heads, splits, launch)
        is_decode_T = is_decode_R[row_T][:, None, None, None]
        y_TKGH = jnp.where(is_decode_T, y_RKGH[row_T], y_TKGH)
    return jnp.where((position_T >= 0)[:, None, None, None], y_TKGH, 0)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The contiguous tokens of each row."""

    count_R: Array  # number of tokens
    token_R: Array  # first token
    offset_R: Array  # position minus token index

    @classmethod
    def find(cls, row_T: Array, position_T: Array, rows: int) -> "Chunks":
        """Find the tokens of each row; padding has position -1."""
        is_own_RT = (row_T == jnp.arange(rows)[:, None]) & (position_T >= 0)
        token_R = jnp.argmax(is_own_RT, axis=1).astype(jnp.int32)
        count_R = is_own_RT.sum(axis=1, dtype=jnp.int32)
        return cls(count_R, token_R, position_T[token_R] - token_R)


def _attend_chunks(
    q_TKGH: Array, pool: Any, chunks: Chunks, count_R: Array, row_T: Array, launch: Any
) -> Array:
    """Attend with full tiles for the first `count_R` tokens of each row; the rest is undefined."""
    tokens, kv_heads, heads, head_dim = q_TKGH.shape
    size = 2 * WGMMA_ROWS
    plan, slot_TG = _plan_tiles(chunks, count_R, row_T, heads=heads, size=size)
    # The query rows of a kv head are contiguous; the last tile reads some padding after them.
    q_KXH = q_TKGH.swapaxes(0, 1).reshape(kv_heads, tokens * heads, head_dim)
    q_KXH = jnp.pad(q_KXH, ((0, 0), (0, size + -(tokens * heads) % TILING_ROWS), (0, 0)))
    out_IKUH, _ = launch(q_KXH, *pool, plan, heads=heads, splits=1, size=size)
    return out_IKUH.swapaxes(1, 2).reshape(-1, kv_heads, head_dim)[slot_TG].swapaxes(1, 2)


def _plan_tiles(
    chunks: Chunks, count_R: Array, row_T: Array, *, heads: int, size: int
) -> tuple[TilePlan, Array]:
    """Cut the first `count_R` tokens of each row into tiles of `size` query rows.

    Returns:
        The tiles, and the index of each token's heads [T, G] among the query rows of all tiles.
    """
    (tokens,), (rows,) = row_T.shape, count_R.shape
    # A copy begins at a multiple of 8 rows, so a tile's first rows may belong to another row.
    begin_R = chunks.token_R * heads
    first_R = begin_R - begin_R % TILING_ROWS
    tiles_R = jnp.where(count_R > 0, -(-(begin_R - first_R + count_R * heads) // size), 0)
    end_R = jnp.cumsum(tiles_R)
    start_R = end_R - tiles_R
    tiles = -(-(tokens * heads + rows * (size + TILING_ROWS - 2)) // size)  # enough for any chunks
    at_I = jnp.arange(tiles, dtype=jnp.int32)
    row_I = jnp.minimum((at_I[:, None] >= end_R).sum(axis=1, dtype=jnp.int32), rows - 1)
    first_I = first_R[row_I] + (at_I - start_R[row_I]) * size
    stored_I = (chunks.offset_R + chunks.token_R + count_R - 1)[row_I]
    last_I = jnp.minimum(chunks.offset_R[row_I] + (first_I + size - 1) // heads, stored_I)
    slot_T = start_R[row_T] * size + jnp.arange(tokens) * heads - first_R[row_T]
    plan = TilePlan(row_I, first_I, chunks.offset_R[row_I], last_I, stored_I, end_R[-1:])
    return plan, slot_T[:, None] + jnp.arange(heads)


@dataclasses.dataclass(frozen=True)
class _Config:
    """Static configuration of a launch."""

    tiles: int
    kv_heads: int
    page: int
    head_dim: int
    heads: int  # query rows per token
    size: int  # query rows per tile of a prefill; 0 in a decode step
    splits: int
    row_groups: int  # compute warpgroups that share a tile
    side: int  # kv heads per work item, a compute warpgroup each
    span: int  # positions per stage
    loaded_rows: int  # query rows per warpgroup that are loaded
    stored_rows: int  # query rows per warpgroup that are stored
    page_dtype: Any
    dtype: Any  # of wgmma operands
    out_dtype: Any
    interpret: Any

    @property
    def compute_warpgroups(self) -> int:
        return self.row_groups * self.side

    @property
    def is_fp8(self) -> bool:
        return self.page_dtype == FP8

    @property
    def scale(self) -> float:
        """Factor of scores in powers of two."""
        return self.head_dim**-0.5 * math.log2(math.e)


class _Refs(NamedTuple):
    """Operands and results in global memory."""

    q: Any
    k: Any
    v: Any
    table: Any
    row: Any
    first: Any
    offset: Any
    last: Any
    stored: Any
    count: Any  # None: all tiles are in use
    out: Any
    peaks: Any
    totals: Any


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block; the field order is the allocation order."""

    k_empty: Any
    k_full: Any
    k_smem: Any
    out_smem: Any
    q_empty: Any
    q_full: Any
    q_smem: Any
    softmax_smem: Any  # peak and total of a split
    v_empty: Any
    v_full: Any
    v_smem: Any
    dequantized_smem: Any  # a block of keys or values per warpgroup; None for bfloat16 pages


class _Item(NamedTuple):
    """A work item."""

    split: Any
    tile: Any
    head: Any  # first kv head
    start: Any  # first block of positions
    count: Any  # blocks of positions


@functools.partial(jax.jit, static_argnames=("heads", "splits", "size", "sms", "interpret"))
def _attend_tiles(
    q: Array,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    plan: TilePlan,
    *,
    heads: int,
    splits: int,
    size: int = 0,
    sms: int,
    interpret: Any,
) -> tuple[Array, tuple[Array, Array]]:
    """Attend from tiles of query rows to the pages of their rows.

    Args:
        q: query rows of each tile, [I, K, U, H]; with a `size`, those of the whole step,
            [K, T * G.., H], where a tile may reach beyond its row's.
        k_PKZH, v_PKZH, table_RB: as for `attend`.
        plan: the tiles.
        heads: query rows per token.
        splits: parts of a tile's positions.
        size: query rows per tile, in a prefill.
        sms, interpret: as for `attend`.

    Returns:
        [I, K, U, H] like the queries, where U is `size` or else `heads`; with more than one split
        [splits, I, K, U, H] float32, not divided by the softmax total. And the softmax's peak and
        total, [splits, I, K, U..] float32, undefined with one split.
    """
    c = _configure(q, k_PKZH, plan, heads, splits, size, interpret)
    q = q.astype(c.dtype)

    def attention_kernel(*flat: Any) -> None:
        q, k, v, table, row, first, offset, last, stored, *count, out, peaks, totals, smem = flat
        inputs = q, k, v, table, row, first, offset, last, stored, count[0] if count else None
        refs = _Refs(*inputs, out, peaks, totals)
        warpgroup = lax.axis_index("warpgroup")
        # Work items of this SM in the order of the tile walk; the carry counts position blocks.
        walk: Any = functools.partial(
            plgpu.nd_loop,
            ((c.tiles if refs.count is None else refs.count[0]) * (splits * c.kv_heads // c.side),),
            collective_axes="sm",
            init_carry=jnp.int32(0),
        )

        @pl.when(warpgroup == c.compute_warpgroups)
        def _producer() -> None:
            _produce(c, refs, smem, walk)

        @pl.when(warpgroup < c.compute_warpgroups)
        def _consumer() -> None:
            _consume(c, refs, smem, walk, warpgroup)

    out = (splits, c.tiles, c.kv_heads, c.row_groups * c.stored_rows, c.head_dim)
    softmax = (splits, c.tiles, c.kv_heads, c.row_groups * WGMMA_ROWS)
    kernel = plgpu.kernel(
        attention_kernel,
        out_type=[
            jax.ShapeDtypeStruct(out, c.out_dtype),
            jax.ShapeDtypeStruct(softmax, jnp.float32),
            jax.ShapeDtypeStruct(softmax, jnp.float32),
        ],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=c.compute_warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[_allocate(c)],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=512,  # unused: rows are reduced within a warp
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )
    out, peaks, totals = kernel(q, k_PKZH, v_PKZH, table_RB, *jax.tree.leaves(plan))
    return (out if splits > 1 else out[0]), (peaks, totals)


def _configure(
    q: Array, k_PKZH: Array, plan: TilePlan, heads: int, splits: int, size: int, interpret: Any
) -> _Config:
    (tiles,), (kv_heads, page, head_dim) = plan.row_I.shape, k_PKZH.shape[1:]
    rows = size or q.shape[2]
    row_groups = -(-rows // WGMMA_ROWS)
    loaded_rows = rows // row_groups
    # In a decode step that fills the device two kv heads share a thread block, a warpgroup each, so
    # that one computes while the other waits: they have the same pages.
    side = 2 if row_groups == splits == 1 and kv_heads % 2 == 0 else 1
    return _Config(
        tiles=tiles,
        kv_heads=kv_heads,
        page=page,
        head_dim=head_dim,
        heads=heads,
        size=size,
        splits=splits,
        row_groups=row_groups,
        side=side,
        span=min(page, PAIRED_POSITIONS) if side > 1 else page,
        loaded_rows=loaded_rows,
        stored_rows=loaded_rows if size else heads,
        page_dtype=k_PKZH.dtype,
        dtype=jnp.float16 if k_PKZH.dtype == FP8 else q.dtype,
        out_dtype=jnp.float32 if splits > 1 else q.dtype,
        interpret=interpret,
    )


def _allocate(c: _Config) -> _Scratch:
    """Declare the shared memory and the barriers."""
    warpgroups, side = c.compute_warpgroups, c.side
    pages = (_STAGES * side, c.span, c.head_dim)
    # Tiled rows, except where fewer rows than a tile has are stored.
    allocate_out: Any = allocate_swizzled if c.size else plgpu.SMEM
    dequantized_smem = None
    if c.is_fp8:
        dequantized_smem = allocate_swizzled((warpgroups, c.span, c.head_dim), c.dtype)
    return _Scratch(
        k_empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=_STAGES),
        k_full=plgpu.Barrier(num_arrivals=side, num_barriers=_STAGES),
        k_smem=allocate_swizzled(pages, c.page_dtype),
        out_smem=allocate_out((warpgroups, WGMMA_ROWS, c.head_dim), c.out_dtype),
        q_empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2),
        q_full=plgpu.Barrier(num_arrivals=side, num_barriers=2),
        q_smem=allocate_swizzled((2, warpgroups * WGMMA_ROWS, c.head_dim), c.dtype),
        softmax_smem=plgpu.SMEM((warpgroups, 2, WGMMA_ROWS if c.splits > 1 else 1), jnp.float32),
        v_empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=_STAGES),
        v_full=plgpu.Barrier(num_arrivals=side, num_barriers=_STAGES),
        v_smem=allocate_swizzled(pages, c.page_dtype),
        dequantized_smem=dequantized_smem,
    )


def _locate(c: _Config, refs: _Refs, info: plgpu.NDLoopInfo) -> _Item:
    """Return the work item of a step of the tile walk."""
    (item,) = info.index
    head, at = lax.rem(item, c.kv_heads // c.side), lax.div(item, c.kv_heads // c.side)
    split, tile = lax.rem(at, c.splits), lax.div(at, c.splits)
    blocks = lax.div(refs.last[tile] + c.span, c.span)
    per_split = lax.div(blocks + c.splits - 1, c.splits)
    start = split * per_split
    count = jnp.maximum(jnp.minimum(per_split, blocks - start), 0)
    return _Item(split, tile, head * c.side, start, count)


def _produce(c: _Config, refs: _Refs, smem: _Scratch, walk: Any) -> None:
    """Producer warpgroup: copy queries, and keys and values of each stage, by TMA."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    @walk()
    def _item(info: plgpu.NDLoopInfo, carry: Array) -> Array:
        item = _locate(c, refs, info)
        slot, row = lax.rem(info.local_index, 2), refs.row[item.tile]

        @pl.when(info.local_index >= 2)
        def _() -> None:
            plgpu.barrier_wait(smem.q_empty.at[slot])

        for one in range(c.side):
            if c.size:
                first = pl.multiple_of(refs.first[item.tile], TILING_ROWS)
                source = refs.q.at[item.head + one, pl.ds(first, c.size)]
            else:
                source = refs.q.at[item.tile, item.head + one]
            target = pl.ds(one * WGMMA_ROWS, c.row_groups * c.loaded_rows)
            plgpu.copy_gmem_to_smem(source, smem.q_smem.at[slot, target], smem.q_full.at[slot])

        @pl.loop(0, item.count)
        def _block(step: Array) -> None:
            at = carry + step
            stage, begin = lax.rem(at, _STAGES), (item.start + step) * c.span
            page, within = refs.table[row, lax.div(begin, c.page)], lax.rem(begin, c.page)
            stored = refs.stored[item.tile] + 1 - begin
            pieces = jnp.minimum(
                lax.div(stored + (COPY_POSITIONS - 1), COPY_POSITIONS), c.span // COPY_POSITIONS
            )
            for pool, pool_smem, full, empty in (
                (refs.k, smem.k_smem, smem.k_full, smem.k_empty),
                (refs.v, smem.v_smem, smem.v_full, smem.v_empty),
            ):

                @pl.when(at >= _STAGES)
                def _(empty: Any = empty) -> None:
                    plgpu.barrier_wait(empty.at[stage])

                _copy_pieces(c, pool, pool_smem, full, item.head, stage, page, within, pieces)

        return carry + item.count


def _copy_pieces(
    c: _Config,
    pool: Any,
    pool_smem: Any,
    full: Any,
    head: Any,
    stage: Any,
    page: Any,
    within: Any,
    pieces: Any,
) -> None:
    """Copy the pieces of a block that hold stored tokens: a row's last page may be partial."""
    for count in range(1, c.span // COPY_POSITIONS + 1):

        @pl.when(pieces == count)
        def _(length: int = count * COPY_POSITIONS) -> None:
            first = pl.multiple_of(within, c.span) if c.span < c.page else 0
            for one in range(c.side):
                plgpu.copy_gmem_to_smem(
                    pool.at[page, head + one, pl.ds(first, length)],
                    pool_smem.at[stage * c.side + one, pl.ds(0, length)],
                    full.at[stage],
                )


def _consume(c: _Config, refs: _Refs, smem: _Scratch, walk: Any, warpgroup: Any) -> None:
    """Compute warpgroup: online softmax over the blocks of positions, then the epilogue."""
    plgpu.set_max_registers(count_registers(c.compute_warpgroups), action="increase")
    # Among kv heads of the item, and among 64-row groups of the tile.
    own_head, row_group = (0, warpgroup) if c.side == 1 else (warpgroup, 0)

    @walk()
    def _item(info: plgpu.NDLoopInfo, carry: Array) -> Array:
        item = _locate(c, refs, info)
        slot = lax.rem(info.local_index, 2)
        first, offset = refs.first[item.tile], refs.offset[item.tile]
        limit = refs.stored[item.tile]
        # Blocks that even the first query row sees completely need no mask.
        unmasked = lax.div(offset + lax.div(first, c.heads) + 1, c.span) - item.start
        unmasked = jnp.clip(unmasked, 0, item.count)
        plgpu.barrier_wait(smem.q_full.at[slot])
        attend_block = functools.partial(
            _attend_block, c, smem, item, warpgroup, own_head, row_group, slot, carry
        )
        seen = first, offset, limit
        state = (
            plgpu.layout_cast(jnp.full((WGMMA_ROWS,), _INITIAL_PEAK, jnp.float32), BY_ROW),
            plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), BY_ROW),
            plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, c.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        )
        state = lax.fori_loop(
            0, unmasked, functools.partial(attend_block, seen, is_masked=False), state
        )
        state = lax.fori_loop(
            unmasked, item.count, functools.partial(attend_block, seen, is_masked=True), state
        )
        plgpu.barrier_arrive(smem.q_empty.at[slot])
        _store(c, refs, smem, item, warpgroup, own_head, row_group, state)
        return carry + item.count

    plgpu.wait_smem_to_gmem(0)


def _attend_block(
    c: _Config,
    smem: _Scratch,
    item: _Item,
    warpgroup: Any,
    own_head: Any,
    row_group: Any,
    slot: Any,
    carry: Any,
    seen: tuple[Any, Any, Any],
    step: Array,
    state: Any,
    *,
    is_masked: bool,
) -> Any:
    """Add one block of positions to the online softmax: S = Q K^T, P = exp2(S - peak), O += P V.

    Args:
        seen: the tile's first query row, its offset from token to position, and the last position
            that the cache stores.
        step: block of the item.
        state: peak [U] and total [U] of the softmax, and the weighted sum of values [U, H].
        is_masked: whether some query row does not see all positions of the block.
    """
    peak_U, total_U, sum_UH = state
    first, offset, limit = seen
    stage, begin = lax.rem(carry + step, _STAGES), (item.start + step) * c.span
    plgpu.barrier_wait(smem.k_full.at[stage])
    rows = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)
    keys = smem.k_smem.at[stage * c.side + own_head]
    if c.is_fp8:
        keys = _dequantize(c, smem, warpgroup, keys[...])

    def multiply(acc: Any) -> Any:
        plgpu.wgmma(acc, smem.q_smem.at[slot, rows], keys.transpose((1, 0)))
        return acc[...]

    score_US = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, c.span), jnp.float32))
    plgpu.barrier_arrive(smem.k_empty.at[stage])
    if is_masked:
        u, s = (_iota((WGMMA_ROWS, c.span), axis) for axis in (0, 1))
        token = lax.div(first + row_group * WGMMA_ROWS + u, c.heads)
        score_US = jnp.where(offset + token >= begin + s, score_US, -jnp.inf)
    new_peak_U = jnp.maximum(peak_U, score_US.max(axis=1) * c.scale)
    rescale_U = jnp.exp2(peak_U - new_peak_U)
    weight_US = jnp.exp2(score_US * c.scale - broadcast_rows(new_peak_U, score_US.shape))
    total_U = total_U * rescale_U + weight_US.sum(axis=1)
    sum_UH = sum_UH * broadcast_rows(rescale_U, sum_UH.shape)
    weight_US = weight_US.astype(c.dtype)
    plgpu.barrier_wait(smem.v_full.at[stage])
    values = smem.v_smem.at[stage * c.side + own_head]

    def mask(v_SH: Array) -> Array:
        """Zero positions after the last stored one: stale data may be nan, and 0 * nan is nan."""
        is_stored = begin + _iota(v_SH.shape, 0) <= limit
        return jnp.where(is_stored, v_SH, jnp.zeros_like(v_SH))

    if c.is_fp8 and is_masked:
        v_SH = load(values, layout=plgpu.Layout.WGMMA, optimized=False)
        values = _dequantize(c, smem, warpgroup, v_SH, mask)
    elif c.is_fp8:
        values = _dequantize(c, smem, warpgroup, values[...])
    elif is_masked:
        # The warpgroups that share the block write the same values.
        @pl.when(begin + c.span - 1 > limit)
        def _() -> None:
            values[...] = mask(load(values, layout=plgpu.Layout.WGMMA))
            plgpu.commit_smem()

    sum_UH = _add_product(sum_UH, weight_US, values, c.interpret)
    plgpu.barrier_arrive(smem.v_empty.at[stage])
    return new_peak_U, total_U, sum_UH


def _dequantize(
    c: _Config, smem: _Scratch, warpgroup: Any, page_SH: Array, change: Any = lambda x: x
) -> Any:
    """Write a block of e4m3 positions as float16 into this warpgroup's own shared memory."""
    plgpu.commit_smem()  # the whole warpgroup has read the previous block
    smem.dequantized_smem[warpgroup] = change(page_SH.astype(c.dtype))
    plgpu.commit_smem()
    return smem.dequantized_smem.at[warpgroup]


def _store(
    c: _Config,
    refs: _Refs,
    smem: _Scratch,
    item: _Item,
    warpgroup: Any,
    own_head: Any,
    row_group: Any,
    state: Any,
) -> None:
    """Epilogue: normalize the output, or keep peak and total of a split, and store by TMA."""
    peak_U, total_U, sum_UH = state
    split, tile, head = item.split, item.tile, item.head
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if c.splits > 1:
        smem.softmax_smem[warpgroup, 0] = peak_U
        smem.softmax_smem[warpgroup, 1] = total_U
    else:
        sum_UH = sum_UH / broadcast_rows(jnp.maximum(total_U, 1e-30), sum_UH.shape)
    smem.out_smem[warpgroup] = sum_UH.astype(c.out_dtype)
    plgpu.commit_smem()
    rows = pl.ds(row_group * c.stored_rows, c.stored_rows)
    plgpu.copy_smem_to_gmem(
        smem.out_smem.at[warpgroup, pl.ds(0, c.stored_rows)],
        refs.out.at[split, tile, head + own_head, rows],
    )
    if c.splits > 1:
        for at, target in enumerate((refs.peaks, refs.totals)):
            plgpu.copy_smem_to_gmem(
                smem.softmax_smem.at[warpgroup, at],
                target.at[split, tile, head + own_head, pl.ds(row_group * WGMMA_ROWS, WGMMA_ROWS)],
            )


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _add_product(sum_UH: Array, left_US: Array, right_SH: Any, interpret: Any) -> Array:
    """Add the product of registers and shared memory to a sum in registers."""
    if interpret is not None:  # the interpreter knows wgmma of two references only
        product = jnp.dot(left_US, right_SH[...], preferred_element_type=jnp.float32)
        return sum_UH + product
    add: Any = pl.run_state(lambda acc: plgpu.wgmma(acc, left_US, right_SH))
    return add(plgpu.WGMMAAccumulatorRef.init(sum_UH))
