"""Attention over pages on Hopper's tensor cores: prompts, decode tokens and mixes.

The query heads of a kv head share its keys, so they are rows of one matrix: token by token, the
heads of a token side by side. A tile is some of these rows, of one row of the step. In a decode
step each token is a tile of its own, and where those are few the positions are cut as well, each
part with its own softmax, to be joined afterwards. Its key and value stand behind its queries in
the tile, as `heads` leaves them; nobody reads what they attend.

Pages in e4m3 are widened in shared memory, to float16 and not to bfloat16: the device converts to
it in one instruction, it holds every e4m3, and queries and softmax lose nothing in it either.

Letters here: I tiles, U query rows of a tile.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.blocks import count_registers, spread
from l4jax.kernels.formats import FP8
from l4jax.kernels.rows import join_rows

_load: Any = plgpu.load  # whose parameters differ between versions of jax

_ROWS = 64  # query rows of a warpgroup
_BLOCK = 8  # rows that lie together in shared memory
_MOST_SPLITS = 32
_PIECE = 32  # positions of a page that are copied or left out together
_SHORT = 64  # positions that are attended at once where two kv heads share the memory for them
_NEVER = -1e30  # below every score, and finite: what sees nothing gives 0 / tiny and not nan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """What a tile is, int32 each."""

    row_I: Array  # of the step: which table
    first_I: Array  # query row, counted over the whole step, of the tile's first
    offset_I: Array  # what is added to the token of a query row to give its position
    last_I: Array  # position that the tile's last token stands at; -1 sees nothing
    stored_I: Array  # position that the row's last token stands at: beyond it lies what was left
    count: Array | None = None  # [1]: tiles that are used, the first ones; by default all


def is_supported(dtype: Any, rows: int, k_PKZH: Array) -> bool:
    """Whether `attend` runs this dtype, with so many queries, keys and values of a kv head, and
    these pages."""
    page, head_dim = k_PKZH.shape[2:]
    is_known = dtype == jnp.bfloat16 and k_PKZH.dtype in (jnp.bfloat16, FP8)
    return is_known and head_dim == 128 and page in (64, 128) and rows <= _ROWS


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
    """`reference.attend_pages`, on a device with so many multiprocessors.

    Args:
        x_TKUH: of each kv head's rows the first `heads` are queries.
        sms: multiprocessors.
        interpret: as for the other kernels.
    """
    run = functools.partial(_attend_tiles, sms=sms, interpret=interpret)
    rows = table_RB.shape[0]
    tokens, kv_heads, *_ = x_TKUH.shape
    # As many parts as fill the device, but none of less than a page.
    splits = max(1, min(_MOST_SPLITS, 2 * sms // (kv_heads * rows), table_RB.shape[1]))
    pool = (k_PKZH, v_PKZH, table_RB)
    if tokens == rows:  # a decode step
        return _attend_each(x_TKUH, pool, row_T, position_T, heads, splits, run)
    return _attend_mix(x_TKUH, pool, row_T, position_T, heads, splits, run)


def _attend_each(
    x_TKUH: Array, pool: Any, row_T: Array, position_T: Array, heads: int, splits: int, run: Any
) -> Array:
    """A tile for each token, of whose rows the first `heads` are queries."""
    tokens, kv_heads, _, head_dim = x_TKUH.shape
    at_T = jnp.arange(tokens, dtype=jnp.int32)
    plan = TilePlan(row_T, at_T * heads, position_T - at_T, position_T, position_T)
    out, softmax = run(x_TKUH, *pool, plan, heads=heads, splits=splits)
    if splits == 1:
        return out
    joined = join_rows(out, *softmax, interpret=run.keywords["interpret"])
    return joined.reshape(tokens, kv_heads, heads, head_dim)


def _attend_mix(
    x_TKUH: Array, pool: Any, row_T: Array, position_T: Array, heads: int, splits: int, run: Any
) -> Array:
    """Whole tiles for prompts, and for who decodes beside them what it has when it is alone: such
    a token would leave most of a tile empty."""
    rows = pool[2].shape[0]
    runs = Runs.find(row_T, position_T, rows)
    is_alone_R = (runs.count_R == 1) & (rows > 1)
    count_R = jnp.where(is_alone_R, 0, runs.count_R)
    y_TKGH = _attend_runs(x_TKUH[:, :, :heads], pool, runs, count_R, row_T, run)
    if rows > 1:
        at_R = jnp.where(is_alone_R, runs.offset_R + runs.token_R, -1)
        each_R = jnp.arange(rows, dtype=jnp.int32)
        y_RKGH = _attend_each(x_TKUH[runs.token_R], pool, each_R, at_R, heads, splits, run)
        is_alone_T = is_alone_R[row_T][:, None, None, None]
        y_TKGH = jnp.where(is_alone_T, y_RKGH[row_T], y_TKGH)
    return jnp.where((position_T >= 0)[:, None, None, None], y_TKGH, 0)


@dataclasses.dataclass(frozen=True)
class Runs:
    """The tokens of each row, which stand in a run."""

    count_R: Array  # how many
    token_R: Array  # the first one
    offset_R: Array  # what is added to a token to give its position

    @classmethod
    def find(cls, row_T: Array, position_T: Array, rows: int) -> "Runs":
        is_mine_RT = (row_T == jnp.arange(rows)[:, None]) & (position_T >= 0)
        token_R = jnp.argmax(is_mine_RT, axis=1).astype(jnp.int32)
        count_R = is_mine_RT.sum(axis=1, dtype=jnp.int32)
        return cls(count_R, token_R, position_T[token_R] - token_R)


def _attend_runs(
    q_TKGH: Array, pool: Any, runs: Runs, count_R: Array, row_T: Array, run: Any
) -> Array:
    """Whole tiles for the first `count_R` tokens of each row's run; of others undefined."""
    tokens, kv_heads, heads, head_dim = q_TKGH.shape
    size = 2 * _ROWS
    plan, slot_TG = _cut(runs, count_R, row_T, heads=heads, size=size)
    # Of a kv head the query rows of a tile are neighbors; behind the last one lies some padding.
    q_KXH = q_TKGH.swapaxes(0, 1).reshape(kv_heads, tokens * heads, head_dim)
    q_KXH = jnp.pad(q_KXH, ((0, 0), (0, size + -(tokens * heads) % _BLOCK), (0, 0)))
    out_IKUH, _ = run(q_KXH, *pool, plan, heads=heads, splits=1, size=size)
    return out_IKUH.swapaxes(1, 2).reshape(-1, kv_heads, head_dim)[slot_TG].swapaxes(1, 2)


def _cut(
    runs: Runs, count_R: Array, row_T: Array, *, heads: int, size: int
) -> tuple[TilePlan, Array]:
    """Cut the first tokens of each row's run into tiles of `size` query rows; also, [T, G], where
    in all tiles' query rows each token's heads are."""
    (tokens,), (rows,) = row_T.shape, count_R.shape
    # A copy begins at a whole block, so a tile's first rows may be another row's.
    begin_R = runs.token_R * heads
    first_R = begin_R - begin_R % _BLOCK
    tiles_R = jnp.where(count_R > 0, -(-(begin_R - first_R + count_R * heads) // size), 0)
    end_R = jnp.cumsum(tiles_R)
    start_R = end_R - tiles_R
    most = -(-(tokens * heads + rows * (size + _BLOCK - 2)) // size)
    at_I = jnp.arange(most, dtype=jnp.int32)
    row_I = jnp.minimum((at_I[:, None] >= end_R).sum(axis=1, dtype=jnp.int32), rows - 1)
    first_I = first_R[row_I] + (at_I - start_R[row_I]) * size
    stored_I = (runs.offset_R + runs.token_R + count_R - 1)[row_I]
    last_I = jnp.minimum(runs.offset_R[row_I] + (first_I + size - 1) // heads, stored_I)
    slot_T = start_R[row_T] * size + jnp.arange(tokens) * heads - first_R[row_T]
    plan = TilePlan(row_I, first_I, runs.offset_R[row_I], last_I, stored_I, end_R[-1:])
    return plan, slot_T[:, None] + jnp.arange(heads)


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
    """Tiles of query rows over the pages of their rows.

    Args:
        q: the query rows of each tile, [I, K, U, H]; or, where a tile's `size` is told, those of
            the whole step, [K, T * G.., H], of which a tile may reach beyond its own.
        k_PKZH, v_PKZH, table_RB: as for `attend`.
        plan: the tiles.
        heads: query rows of a token.
        splits: parts that the positions of a tile are cut into.
        size: see `q`.
        sms, interpret: as for `attend`.

    Returns:
        [I, K, U, H] like the queries, U being `size` or else `heads`; of more than one split,
        [splits, I, K, U, H] float32, not yet divided by the total weight. And the softmax's peak
        and total, [splits, I, K, U..] float32, undefined where there is one split.
    """
    (tiles,), (kv_heads, page, head_dim) = plan.row_I.shape, k_PKZH.shape[1:]
    height, out_dtype = size or q.shape[2], q.dtype
    is_narrow = k_PKZH.dtype == FP8
    dtype = jnp.float16 if is_narrow else out_dtype  # of what is multiplied
    q = q.astype(dtype)
    groups = -(-height // _ROWS)  # warpgroups that share a tile
    kept = height // groups  # rows of each that are read
    given = kept if size else heads  # and written
    # In a decode step that fills the device, kv heads of a tile side by side, a warpgroup for each,
    # so that one of them works while the other waits: they have the same pages.
    side = 2 if groups == splits == 1 and kv_heads % 2 == 0 else 1
    span = min(page, _SHORT) if side > 1 else page  # positions attended at once
    computing = groups * side
    scale = head_dim**-0.5 * math.log2(math.e)
    stages, is_split = 2, splits > 1
    out_dtype = jnp.float32 if is_split else out_dtype

    def pages_body(
        *refs: Any,
        q_smem: Any,
        k_smem: Any,
        v_smem: Any,
        out_smem: Any,
        softmax_smem: Any,
        q_full: Any,
        q_free: Any,
        k_full: Any,
        k_free: Any,
        v_full: Any,
        v_free: Any,
        wide_smem: Any = None,
    ) -> None:
        q, k, v, table, row, first_row, offset, last, stored, *used, out, peaks, totals = refs
        warpgroup = lax.axis_index("warpgroup")
        share: Any = functools.partial(
            plgpu.nd_loop,
            ((used[0][0] if used else tiles) * (splits * kv_heads // side),),
            collective_axes="sm",
            init_carry=jnp.int32(0),  # spans that went before
        )

        def locate(info: plgpu.NDLoopInfo) -> tuple[Any, Any, Any, Any, Any]:
            """Split, tile and first kv head of an item; its first span, and how many it has."""
            (item,) = info.index
            head, at = lax.rem(item, kv_heads // side), lax.div(item, kv_heads // side)
            split, tile = lax.rem(at, splits), lax.div(at, splits)
            spans = lax.div(last[tile] + span, span)
            each = lax.div(spans + splits - 1, splits)
            start = split * each
            count = jnp.maximum(jnp.minimum(each, spans - start), 0)
            return split, tile, head * side, start, count

        @pl.when(warpgroup == computing)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @share()
            def _item(info: plgpu.NDLoopInfo, carry: Array) -> Array:
                _, tile, head, start, count = locate(info)
                slot, mine = lax.rem(info.local_index, 2), row[tile]

                @pl.when(info.local_index >= 2)
                def _() -> None:
                    plgpu.barrier_wait(q_free.at[slot])

                for one in range(side):
                    if size:
                        first = pl.multiple_of(first_row[tile], _BLOCK)
                        source = q.at[head + one, pl.ds(first, size)]
                    else:
                        source = q.at[tile, head + one]
                    here = pl.ds(one * _ROWS, groups * kept)
                    plgpu.copy_gmem_to_smem(source, q_smem.at[slot, here], q_full.at[slot])

                @pl.loop(0, count)
                def _span(step: Array) -> None:
                    at = carry + step
                    stage, begin = lax.rem(at, stages), (start + step) * span
                    found, within = table[mine, lax.div(begin, page)], lax.rem(begin, page)
                    held = stored[tile] + 1 - begin
                    wanted = jnp.minimum(lax.div(held + (_PIECE - 1), _PIECE), span // _PIECE)
                    for pool, smem, full, free in (
                        (k, k_smem, k_full, k_free),
                        (v, v_smem, v_full, v_free),
                    ):

                        @pl.when(at >= stages)
                        def _(free: Any = free) -> None:
                            plgpu.barrier_wait(free.at[stage])

                        # Of a row's last page no more than the pieces that hold something.
                        for pieces in range(1, span // _PIECE + 1):

                            @pl.when(wanted == pieces)
                            def _(
                                length: int = pieces * _PIECE,
                                pool: Any = pool,
                                smem: Any = smem,
                                full: Any = full,
                            ) -> None:
                                first = pl.multiple_of(within, span) if span < page else 0
                                for one in range(side):
                                    plgpu.copy_gmem_to_smem(
                                        pool.at[found, head + one, pl.ds(first, length)],
                                        smem.at[stage * side + one, pl.ds(0, length)],
                                        full.at[stage],
                                    )

                return carry + count

        @pl.when(warpgroup < computing)
        def _compute() -> None:
            plgpu.set_max_registers(count_registers(computing), action="increase")
            # Of the heads side by side, and of the parts of a tile, which is this warpgroup's.
            own, part = (0, warpgroup) if side == 1 else (warpgroup, 0)

            @share()
            def _item(info: plgpu.NDLoopInfo, carry: Array) -> Array:
                split, tile, head, start, count = locate(info)
                slot = lax.rem(info.local_index, 2)
                first, shift, limit = first_row[tile], offset[tile], stored[tile]
                # Spans of which even the first query row sees everything need no mask.
                whole = lax.div(shift + lax.div(first, heads) + 1, span) - start
                whole = jnp.clip(whole, 0, count)
                plgpu.barrier_wait(q_full.at[slot])

                def widen(narrow_SH: Array, change: Any = lambda wide: wide) -> Any:
                    """This warpgroup's own copy of a span, in the dtype that it multiplies in."""
                    plgpu.commit_smem()  # nobody of the warpgroup reads the span before any more
                    wide_smem[warpgroup] = change(narrow_SH.astype(dtype))
                    plgpu.commit_smem()
                    return wide_smem.at[warpgroup]

                def absorb(step: Array, state: Any, is_masked: bool) -> Any:
                    peak_U, total_U, sum_UH = state
                    stage, begin = lax.rem(carry + step, stages), (start + step) * span
                    plgpu.barrier_wait(k_full.at[stage])
                    mine = pl.ds(warpgroup * _ROWS, _ROWS)

                    keys = k_smem.at[stage * side + own]
                    if is_narrow:
                        keys = widen(keys[...])

                    def score(acc: Any) -> Any:
                        plgpu.wgmma(acc, q_smem.at[slot, mine], keys.transpose((1, 0)))
                        return acc[...]

                    score_US = pl.run_scoped(
                        score, plgpu.WGMMAAccumulatorRef((_ROWS, span), jnp.float32)
                    )
                    plgpu.barrier_arrive(k_free.at[stage])
                    if is_masked:
                        u, s = (_count((_ROWS, span), axis) for axis in (0, 1))
                        token = lax.div(first + part * _ROWS + u, heads)
                        score_US = jnp.where(shift + token >= begin + s, score_US, -jnp.inf)
                    new_peak_U = jnp.maximum(peak_U, score_US.max(axis=1) * scale)
                    shrink_U = jnp.exp2(peak_U - new_peak_U)
                    weight_US = jnp.exp2(score_US * scale - spread(new_peak_U, score_US.shape))
                    total_U = total_U * shrink_U + weight_US.sum(axis=1)
                    sum_UH = sum_UH * spread(shrink_U, sum_UH.shape)
                    weight_US = weight_US.astype(dtype)
                    plgpu.barrier_wait(v_full.at[stage])
                    values = v_smem.at[stage * side + own]

                    def mask(v_SH: Array) -> Array:
                        """What the last owner left may be nan, and 0 * nan is nan."""
                        is_stored = begin + _count(v_SH.shape, 0) <= limit
                        return jnp.where(is_stored, v_SH, jnp.zeros_like(v_SH))

                    if is_narrow and is_masked:
                        v_SH = _load(values, layout=plgpu.Layout.WGMMA, optimized=False)
                        values = widen(v_SH, mask)
                    elif is_narrow:
                        values = widen(values[...])
                    elif is_masked:
                        # All warpgroups that share it write the same.
                        @pl.when(begin + span - 1 > limit)
                        def _() -> None:
                            values[...] = mask(_load(values, layout=plgpu.Layout.WGMMA))
                            plgpu.commit_smem()

                    sum_UH = _add_product(sum_UH, weight_US, values, interpret)
                    plgpu.barrier_arrive(v_free.at[stage])
                    return new_peak_U, total_U, sum_UH

                by_row = plgpu.Layout.WGMMA.reduce(1)
                state = (
                    plgpu.layout_cast(jnp.full((_ROWS,), _NEVER, jnp.float32), by_row),
                    plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), by_row),
                    plgpu.layout_cast(
                        jnp.zeros((_ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA
                    ),
                )
                see = functools.partial(absorb, is_masked=False)
                state = lax.fori_loop(0, whole, see, state)
                look = functools.partial(absorb, is_masked=True)
                peak_U, total_U, sum_UH = lax.fori_loop(whole, count, look, state)
                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if is_split:
                    softmax_smem[warpgroup, 0] = peak_U
                    softmax_smem[warpgroup, 1] = total_U
                else:
                    sum_UH = sum_UH / spread(jnp.maximum(total_U, 1e-30), sum_UH.shape)
                out_smem[warpgroup] = sum_UH.astype(out_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    out_smem.at[warpgroup, pl.ds(0, given)],
                    out.at[split, tile, head + own, pl.ds(part * given, given)],
                )
                if is_split:
                    for at, to in enumerate((peaks, totals)):
                        plgpu.copy_smem_to_gmem(
                            softmax_smem.at[warpgroup, at],
                            to.at[split, tile, head + own, pl.ds(part * _ROWS, _ROWS)],
                        )
                return carry + count

            plgpu.wait_smem_to_gmem(0)

    softmax = jax.ShapeDtypeStruct((splits, tiles, kv_heads, groups * _ROWS), jnp.float32)
    kernel = plgpu.kernel(
        pages_body,
        out_type=[
            jax.ShapeDtypeStruct((splits, tiles, kv_heads, groups * given, head_dim), out_dtype),
            softmax,
            softmax,
        ],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=computing + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            q_smem=_allocate((2, computing * _ROWS, head_dim), dtype),
            k_smem=_allocate((stages * side, span, head_dim), k_PKZH.dtype),
            v_smem=_allocate((stages * side, span, head_dim), v_PKZH.dtype),
            # In blocks of rows, but where fewer than such a block are written.
            out_smem=(_allocate if size else plgpu.SMEM)((computing, _ROWS, head_dim), out_dtype),
            softmax_smem=plgpu.SMEM((computing, 2, _ROWS if is_split else 1), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=side, num_barriers=2),
            q_free=plgpu.Barrier(num_arrivals=computing, num_barriers=2),
            k_full=plgpu.Barrier(num_arrivals=side, num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
            v_full=plgpu.Barrier(num_arrivals=side, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
            **({"wide_smem": _allocate((computing, span, head_dim), dtype)} if is_narrow else {}),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=512,  # rows are reduced within a warp: it needs none
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )
    out, peaks, totals = kernel(q, k_PKZH, v_PKZH, table_RB, *jax.tree.leaves(plan))
    return (out if is_split else out[0]), (peaks, totals)


def _allocate(shape: tuple[int, ...], dtype: Any) -> Any:
    line = (_BLOCK, 128 // jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform(line), plgpu.SwizzleTransform(128))
    )


def _count(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _add_product(sum_UH: Array, left_US: Array, right_SH: Any, interpret: Any) -> Array:
    """A sum, and to it the product of an array and what lies in shared memory."""
    if interpret is not None:  # the interpreter knows wgmma on two references only
        product = jnp.dot(left_US, right_SH[...], preferred_element_type=jnp.float32)
        return sum_UH + product
    add: Any = pl.run_state(lambda acc: plgpu.wgmma(acc, left_US, right_SH))
    return add(plgpu.WGMMAAccumulatorRef.init(sum_UH))
