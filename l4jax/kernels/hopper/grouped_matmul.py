"""Grouped matmul on Hopper's tensor cores: blocks of tokens times the matrices of their experts.

A block is a few slots whose tokens share an expert; `expert_I` lists the expert of each block. An
expert without tokens is never read. The weights are the left operand of wgmma (M = 64 rows an
instruction), the tokens the right one (N = 8 an instruction). So a decode step wastes little, and
the same kernel fills the tensor cores in a prefill.

It is a persistent kernel: one thread block per SM walks over the work items. Warpgroups are
specialized, here with two pipeline stages and two compute warpgroups:

    producer   TMA w0 x0 | w1 x1 | wait e0, w0 x0 | wait e1, w1 x1 | next item w0 x0 ...
    consumer 0 wait f0      wgmma 0 | wait f1, wgmma 1, free e0 | ...   | epilogue
    consumer 1 wait f0      wgmma 0 | wait f1, wgmma 1, free e0 | ...   | epilogue
                                                       f: full, e: empty barrier of a stage

The producer runs ahead over the borders between work items, so memory never waits for arithmetic.
A stage is freed once the next stage's wgmma is issued and its own is complete.

- bfloat16, fp8: wgmma reads both operands from shared memory.
- int4: weights pass through registers (`int4.dequantize`), one group of 128 columns at a time.
  While the wgmma of a group runs, the group's scales and the next group's weights are loaded.
- Resident tokens (fp8, at most 8 tokens): consumers load all tokens from global memory, apply the
  norm, quantize them once and keep them in shared memory. The producer copies weights only. This
  happens while the first weights are in flight, and saves a launch.

Epilogue: multiply by the fp8 row scales, cast, transpose 64 rows into shared memory, TMA store.
With split-K each split stores float32 partial products, which the next kernel sums.

Tile walk, innermost first: split-K part; block within a grid of `grid_width` blocks; row tile of
the matrix; grid. Neighboring items share weights, which the L2 cache then serves.

Shared memory, fp8, 8 tokens of Scout (5,120 columns) in a decode step, tile_m 128, tile_k 128:

    w_smem          11 stages x 128 x 128 x 1      180,224 bytes
    x_smem          40 steps x 8 x 128 x 1          40,960 (resident)
    out_smem        2 warpgroups x 8 x 64 x 2        2,048
    exchange_smem   2 values x 2 x 8 x 4               128
    barriers        11 full, 11 empty, 2 meeting       192
                                                   223,552
    launch, with alignment and scratch             228,544 of 232,448 bytes per SM

Letters: I blocks, T slots of a block, S slots of all blocks, O rows of a matrix, U its columns.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.config import INT4_GROUP
from l4jax.kernels.formats import compute_fp8_scale
from l4jax.kernels.hopper import int4
from l4jax.kernels.hopper.heuristics import SCALES, TileConfig
from l4jax.kernels.hopper.mosaic import (
    BY_ROW,
    EIGHT_ROWS,
    PRODUCER_REGISTERS,
    SWIZZLE_BYTES,
    WGMMA_ROWS,
    allocate_swizzled,
    broadcast_rows,
    count_registers,
    load,
    load_row,
    stack_rows,
)
from l4jax.kernels.reference import Norm


@functools.partial(jax.jit, static_argnames=("tiles", "dtype", "sms", "shared_blocks", "interpret"))
def grouped_matmul(
    x_ITU: Array,
    weights: tuple[Array, ...],
    scales: tuple[Array, ...],
    expert_I: Array,
    count: Array,
    *,
    tiles: TileConfig,
    dtype: Any,
    sms: int,
    shared_blocks: int = 0,
    interpret: Any = None,
) -> Array:
    """Multiply each block by the matrix of its expert.

    Args:
        x_ITU: blocks of tokens: e4m3 for e4m3 weights, else bfloat16; for int4 weights with
            permuted columns (`int4.permute_columns`).
        weights: stacks [E, O, U] of matrices, all bfloat16, all e4m3 or all int4.
        scales: float32 stacks of scales: [E, O] for e4m3; [E, O, L], one per 128 columns, for int4;
            none for bfloat16.
        expert_I: int32 expert of each block after the shared ones, counted through the stacks.
        count: int32 [1], active blocks; the output of the others is undefined.
        tiles: tiling.
        dtype: of the result; accumulation is float32.
        sms: multiprocessors of the device.
        shared_blocks: number of leading blocks, which use the last matrix of all.
        interpret: Pallas's interpreter parameters, on a device that is not a Hopper GPU.

    Returns:
        [split_k, I * T, O] partial products, not yet multiplied by the scales of the tokens.
    """
    blocks, slots, columns = x_ITU.shape
    x_SU = x_ITU.reshape(blocks * slots, columns)
    if weights[0].dtype == jnp.int4 and (missing := -scales[0].shape[2] % SCALES):
        scales = tuple(jnp.pad(scale, ((0, 0), (0, 0), (0, missing))) for scale in scales)
    config = _configure(weights, tiles, None, shared_blocks, x_SU, slots, dtype, interpret)
    (out,) = _launch(config, x_SU, weights, scales, expert_I, count, None, blocks, sms)
    return out


@functools.partial(
    jax.jit, static_argnames=("slots", "tiles", "dtype", "sms", "shared_blocks", "interpret")
)
def grouped_matmul_resident(
    x_TU: Array,
    norm: Norm | None,
    weights: tuple[Array, ...],
    scales: tuple[Array, ...],
    expert_I: Array,
    count: Array,
    *,
    slots: int,
    tiles: TileConfig,
    dtype: Any,
    sms: int,
    shared_blocks: int = 0,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Multiply all tokens, in bfloat16, by e4m3 matrices of several experts.

    Each SM normalizes and quantizes the tokens itself while the first weights are in flight: this
    costs no launch.

    Args:
        x_TU: tokens, at most `slots`.
        norm: applied to the tokens first.
        slots: per block; the tokens take the first ones in order.
        weights, scales, expert_I, count, tiles, dtype, sms, shared_blocks, interpret: as for
            `grouped_matmul`.

    Returns:
        The result of `grouped_matmul`, and float32 scales [slots]. The scales of unused slots stay
        in the array: to cut them off would be a launch.
    """
    config = _configure(weights, tiles, norm, shared_blocks, x_TU, slots, dtype, interpret)
    blocks = shared_blocks + len(expert_I)
    return _launch(config, x_TU, weights, scales, expert_I, count, norm, blocks, sms)


@dataclasses.dataclass(frozen=True)
class _Config:
    """Static configuration of a launch."""

    tiles: TileConfig
    stacks: tuple[tuple[int, int], ...]  # (first matrix, matrices) of each stack of weights
    shared_blocks: int
    eps: float | None  # of the norm of resident tokens; None without a norm
    tokens: int
    slots: int  # per block
    rows: int  # of a matrix
    columns: int
    weight_dtype: Any
    x_dtype: Any  # in shared memory
    dtype: Any  # of the result
    interpret: Any

    @property
    def is_int4(self) -> bool:
        return self.weight_dtype == jnp.int4

    @property
    def groups(self) -> int:
        """int4 groups per stage."""
        return self.tiles.tile_k // INT4_GROUP

    @property
    def row_tiles(self) -> int:
        return self.rows // self.tiles.tile_m

    @property
    def steps(self) -> int:
        """Pipeline steps of a work item."""
        return self.columns // (self.tiles.tile_k * self.tiles.split_k)

    @property
    def warpgroup_rows(self) -> int:
        return self.tiles.tile_m // self.tiles.compute_warpgroups


class _Refs(NamedTuple):
    """Operands and results in global memory."""

    x: Any
    expert: Any
    weights: tuple[Any, ...]
    scales: tuple[Any, ...]  # None for each stack without scales
    norm: Any  # None without a norm
    out: Any
    x_scale: Any  # of resident tokens, else None


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block; the field order is the allocation order."""

    exchange_smem: Any  # amax and sums of squares of resident tokens, by warpgroup
    empty: Any  # by stage
    full: Any  # by stage
    meeting: Any  # of compute warpgroups that quantize resident tokens
    out_smem: Any
    scale_smem: Any  # of int4
    w_smem: Any
    x_smem: Any


def _configure(
    weights: tuple[Array, ...],
    tiles: TileConfig,
    norm: Norm | None,
    shared_blocks: int,
    x_SU: Array,
    slots: int,
    dtype: Any,
    interpret: Any,
) -> _Config:
    (tokens, columns), weight_dtype = x_SU.shape, weights[0].dtype
    sizes = [weight.shape[0] for weight in weights]
    config = _Config(
        tiles=tiles,
        stacks=tuple((sum(sizes[:at]), size) for at, size in enumerate(sizes)),
        shared_blocks=shared_blocks,
        eps=None if norm is None else norm.eps,
        tokens=tokens,
        slots=slots,
        rows=weights[0].shape[1],
        columns=columns,
        weight_dtype=weight_dtype,
        x_dtype=weight_dtype if tiles.is_resident else x_SU.dtype,
        dtype=dtype,
        interpret=interpret,
    )
    assert config.rows % tiles.tile_m == 0
    assert columns == config.steps * tiles.tile_k * tiles.split_k
    # A stage is freed once the next one is full.
    assert tiles.stages > 1 and (not config.is_int4 or SCALES % config.groups == 0)
    return config


def _launch(
    c: _Config,
    x_SU: Array,
    weights: tuple[Array, ...],
    scales: tuple[Array, ...],
    expert_I: Array,
    count: Array,
    norm: Norm | None,
    blocks: int,
    sms: int,
) -> Any:
    """Launch the kernel; x is the tokens themselves where the tiling says resident."""
    tiles = c.tiles

    def grouped_matmul_kernel(*flat: Any) -> None:
        x, expert, counts, *others, smem = flat
        inputs = len(weights) + len(scales)
        norm_ref = None if norm is None else others.pop(inputs)
        out, *x_scale = others[inputs:]
        refs = _Refs(
            x=x,
            expert=expert,
            weights=tuple(others[: len(weights)]),
            scales=tuple(others[len(weights) : inputs] or [None] * len(weights)),
            norm=norm_ref,
            out=out,
            x_scale=x_scale[0] if x_scale else None,
        )
        warpgroup, active = lax.axis_index("warpgroup"), counts[0]
        # Work items of this SM, in the order of the tile walk.
        walk = functools.partial(
            plgpu.nd_loop, (active * (c.row_tiles * tiles.split_k),), collective_axes="sm"
        )

        @pl.when(warpgroup == tiles.compute_warpgroups)
        def _producer() -> None:
            _produce(c, refs, smem, walk, active)

        @pl.when(warpgroup < tiles.compute_warpgroups)
        def _consumer() -> None:
            _consume(c, refs, smem, walk, active, warpgroup)

    out_types = [jax.ShapeDtypeStruct((tiles.split_k, blocks * c.slots, c.rows), c.dtype)]
    if tiles.is_resident:
        out_types.append(jax.ShapeDtypeStruct((c.slots,), jnp.float32))
    kernel = plgpu.kernel(
        grouped_matmul_kernel,
        out_type=out_types,
        grid=(sms,),
        grid_names=("sm",),
        num_threads=tiles.compute_warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[_allocate(c)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
        interpret=c.interpret,
    )
    operands = x_SU, expert_I, count, *weights, *scales
    return kernel(*operands, *([] if norm is None else [norm.scale_D]))


def _allocate(c: _Config) -> _Scratch:
    """Declare the shared memory and the barriers."""
    tiles = c.tiles
    stages, warpgroups = tiles.stages, tiles.compute_warpgroups
    exchange_smem = meeting = scale_smem = None
    if tiles.is_resident:
        exchange = (1 + (c.eps is not None), warpgroups, c.slots)
        exchange_smem = plgpu.SMEM(exchange, jnp.float32)
        meeting = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2)
    if c.is_int4:
        scale_smem = plgpu.SMEM((stages, tiles.tile_m, SCALES), jnp.float32)
    x_stages = c.columns // tiles.tile_k if tiles.is_resident else stages
    copies = 1 + (not tiles.is_resident) + c.is_int4  # per stage
    return _Scratch(
        exchange_smem=exchange_smem,
        empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        meeting=meeting,
        out_smem=allocate_swizzled((warpgroups, c.slots, WGMMA_ROWS), c.dtype),
        scale_smem=scale_smem,
        # int4: lines as wide as a group, so that one group can be read alone.
        w_smem=allocate_swizzled(
            (stages, tiles.tile_m, tiles.tile_k),
            c.weight_dtype,
            INT4_GROUP // 2 if c.is_int4 else SWIZZLE_BYTES,
        ),
        x_smem=allocate_swizzled((x_stages, c.slots, tiles.tile_k), c.x_dtype),
    )


def _find_expert(c: _Config, refs: _Refs, block: Any) -> Any:
    """Return the matrix of a block, counted through the stacks."""
    if not c.shared_blocks:
        return refs.expert[block]
    return jnp.where(
        block < c.shared_blocks,
        sum(size for _, size in c.stacks) - 1,  # the shared expert
        refs.expert[lax.max(block - c.shared_blocks, 0)],
    )


def _locate(c: _Config, info: plgpu.NDLoopInfo, active: Any) -> tuple[Any, Any, Any]:
    """Return the block, the row tile and the split of a work item: see the tile walk above."""
    (item,), tiles = info.index, c.tiles
    split, at = lax.rem(item, tiles.split_k), lax.div(item, tiles.split_k)
    grid = lax.div(at, c.row_tiles * tiles.grid_width)
    within = lax.rem(at, c.row_tiles * tiles.grid_width)
    width = jnp.minimum(tiles.grid_width, active - grid * tiles.grid_width)
    return grid * tiles.grid_width + lax.rem(within, width), lax.div(within, width), split


def _produce(c: _Config, refs: _Refs, smem: _Scratch, walk: Any, active: Any) -> None:
    """Producer warpgroup: copy weights, int4 scales and tokens of each stage by TMA."""
    tiles, steps = c.tiles, c.steps
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    @walk()
    def _item(info: plgpu.NDLoopInfo) -> None:
        block, tile, split = _locate(c, info, active)
        e, rows = _find_expert(c, refs, block), pl.ds(tile * tiles.tile_m, tiles.tile_m)

        @pl.loop(0, steps)
        def _step(step: Array) -> None:
            at = info.local_index * steps + step
            stage = lax.rem(at, tiles.stages)

            @pl.when(at >= tiles.stages)
            def _() -> None:
                plgpu.barrier_wait(smem.empty.at[stage])

            columns = pl.ds((split * steps + step) * tiles.tile_k, tiles.tile_k)
            group = (split * steps + step) * c.groups
            groups = pl.ds(group - lax.rem(group, SCALES), SCALES)
            for w, scale, (first, size) in zip(refs.weights, refs.scales, c.stacks, strict=True):

                @pl.when((e >= first) & (e < first + size))
                def _(w: Any = w, scale: Any = scale, first: int = first) -> None:
                    plgpu.copy_gmem_to_smem(
                        w.at[e - first, rows, columns], smem.w_smem.at[stage], smem.full.at[stage]
                    )
                    if c.is_int4:
                        plgpu.copy_gmem_to_smem(
                            scale.at[e - first, rows, groups],
                            smem.scale_smem.at[stage],
                            smem.full.at[stage],
                        )

            if not tiles.is_resident:
                plgpu.copy_gmem_to_smem(
                    refs.x.at[pl.ds(block * c.slots, c.slots), columns],
                    smem.x_smem.at[stage],
                    smem.full.at[stage],
                )


def _consume(
    c: _Config, refs: _Refs, smem: _Scratch, walk: Any, active: Any, warpgroup: Any
) -> None:
    """Compute warpgroup: accumulate a tile of rows by wgmma, then run the epilogue."""
    plgpu.set_max_registers(count_registers(c.tiles.compute_warpgroups), action="increase")
    rows = pl.ds(warpgroup * c.warpgroup_rows, c.warpgroup_rows)
    if c.tiles.is_resident:
        _quantize_resident_tokens(c, refs, smem)

    @walk()
    def _item(info: plgpu.NDLoopInfo) -> None:
        block, tile, split = _locate(c, info, active)
        first = info.local_index * c.steps
        if c.is_int4:
            acc = _multiply_int4(c, smem, rows, first, split)
        elif refs.scales[0] is not None:
            # In flight while the rows are multiplied.
            scale = _load_row_scales(c, refs, block, tile, warpgroup)
            acc = _multiply(c, smem, rows, first, split)
            acc *= broadcast_rows(scale, acc.shape)
        else:
            acc = _multiply(c, smem, rows, first, split)
        _store(c, refs, smem, acc.astype(c.dtype), block, tile, split, warpgroup)

    plgpu.wait_smem_to_gmem(0)


def _multiply(c: _Config, smem: _Scratch, rows: Any, first: Any, split: Any) -> Array:
    """Accumulate one work item with both operands in shared memory, two stages in flight."""
    steps, stages = c.steps, c.tiles.stages

    def run(acc: Any) -> Any:
        @pl.loop(0, steps)
        def _step(step: Array) -> None:
            stage = lax.rem(first + step, stages)
            plgpu.barrier_wait(smem.full.at[stage])
            tokens = smem.x_smem.at[split * steps + step if c.tiles.is_resident else stage]
            plgpu.wgmma(acc, smem.w_smem.at[stage, rows], tokens.transpose((1, 0)))
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _() -> None:
                plgpu.barrier_arrive(smem.empty.at[lax.rem(first + step - 1, stages)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem.empty.at[lax.rem(first + steps - 1, stages)])
        return acc[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((c.warpgroup_rows, c.slots), jnp.float32))


def _multiply_int4(c: _Config, smem: _Scratch, rows: Any, first: Any, split: Any) -> Array:
    """Accumulate one work item with int4 weights dequantized in registers, a group at a time.

    Scales multiply the accumulator, which is far smaller than the weights.
    """
    steps, stages, groups = c.steps, c.tiles.stages, c.groups

    def dequantize(stage: Any, group: int) -> Array:
        data = smem.w_smem.at[stage, rows, pl.ds(group * INT4_GROUP, INT4_GROUP)]
        return int4.dequantize(data, c.interpret)

    def run(step: Array, carry: Any) -> Any:
        acc, weight, stage = carry
        following = jnp.where(stage == stages - 1, 0, stage + 1)
        column = lax.rem((split * steps + step) * groups, SCALES)
        for group in range(groups):

            def proceed(group: int = group) -> tuple[Array, Array]:
                """Load the scales of this group and the weights of the next one."""
                scale = smem.scale_smem.at[stage, rows, pl.ds(column + group, 1)]
                scale = int4.load_scales(scale, c.interpret)
                if group + 1 < groups:
                    return scale, dequantize(stage, group + 1)

                @pl.when(step + 1 < steps)
                def _() -> None:
                    plgpu.barrier_wait(smem.full.at[following])

                # After the last step this reads stale data, which is not used.
                return scale, dequantize(following, 0)

            tokens = smem.x_smem.at[stage, :, pl.ds(group * INT4_GROUP, INT4_GROUP)]
            product, (scale, weight) = int4.multiply_from_registers(
                weight, tokens.transpose((1, 0)), proceed, c.interpret
            )
            acc += product * broadcast_rows(scale, product.shape)
        plgpu.barrier_arrive(smem.empty.at[stage])
        return acc, weight, following

    zeros = plgpu.layout_cast(
        jnp.zeros((c.warpgroup_rows, c.slots), jnp.float32), plgpu.Layout.WGMMA
    )
    start = lax.rem(first, stages)
    plgpu.barrier_wait(smem.full.at[start])
    return lax.fori_loop(0, steps, run, (zeros, dequantize(start, 0), start))[0]


def _load_row_scales(c: _Config, refs: _Refs, block: Any, tile: Any, warpgroup: Any) -> Array:
    """Load the fp8 scales of this warpgroup's rows."""
    e = _find_expert(c, refs, block)
    rows = pl.ds(tile * c.tiles.tile_m + warpgroup * c.warpgroup_rows, c.warpgroup_rows)
    total = None
    for scale, (first, size) in zip(refs.scales, c.stacks, strict=True):
        own = load(scale.at[jnp.clip(e - first, 0, size - 1), rows], layout=BY_ROW, optimized=False)
        # Multiply by 0 or 1: the compiler knows no select by a scalar.
        own *= jnp.where((e >= first) & (e < first + size), 1.0, 0.0)
        total = own if total is None else total + own
    assert total is not None
    return total


def _store(
    c: _Config,
    refs: _Refs,
    smem: _Scratch,
    acc: Array,
    block: Any,
    tile: Any,
    split: Any,
    warpgroup: Any,
) -> None:
    """Epilogue: transpose 64 rows at a time into shared memory and store them by TMA."""
    for at in range(0, c.warpgroup_rows, WGMMA_ROWS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.out_smem.at[warpgroup].transpose((1, 0))[...] = plgpu.layout_cast(
            acc[at : at + WGMMA_ROWS], plgpu.Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        first = tile * c.tiles.tile_m + warpgroup * c.warpgroup_rows + at
        rows = pl.ds(first, WGMMA_ROWS)
        plgpu.copy_smem_to_gmem(
            smem.out_smem.at[warpgroup],
            refs.out.at[split, pl.ds(block * c.slots, c.slots), rows],
        )


def _quantize_resident_tokens(c: _Config, refs: _Refs, smem: _Scratch) -> None:
    """Quantize all tokens to e4m3 in shared memory; each warpgroup takes some columns.

    The norm's division by the root mean square goes into the tokens' scales.
    """
    warpgroup, warpgroups = lax.axis_index("warpgroup"), c.tiles.compute_warpgroups
    x, exchange_smem = refs.x, smem.exchange_smem
    steps, slots, tile_k = smem.x_smem.shape
    own_steps = steps // warpgroups
    # One array: Pallas's layout inference takes time quadratic in the number of arrays.
    shape = (slots, own_steps * tile_k)
    columns = pl.ds(warpgroup * (own_steps * tile_k), own_steps * tile_k)
    if c.tokens == slots:
        loaded = load(x.at[:, columns], layout=EIGHT_ROWS, optimized=False)
    else:
        loaded = stack_rows([load_row(x.at[token, columns]) for token in range(c.tokens)])
    x_TU = loaded.astype(jnp.float32)
    if c.eps is not None:
        weight = load_row(refs.norm.at[columns])  # in flight before anything is needed
        exchange_smem[1, warpgroup] = (x_TU * x_TU).sum(axis=1)
        x_TU *= stack_rows([weight]).astype(jnp.float32)
    exchange_smem[0, warpgroup] = jnp.abs(x_TU).max(axis=1)
    plgpu.barrier_arrive(smem.meeting.at[0])
    plgpu.barrier_wait(smem.meeting.at[0])

    def reduce_over_warpgroups(at: int, combine: Any) -> Array:
        layout, refs = EIGHT_ROWS.reduce(1), [exchange_smem.at[at, w] for w in range(warpgroups)]
        return functools.reduce(combine, [load(x, layout=layout, optimized=False) for x in refs])

    scale_T = compute_fp8_scale(reduce_over_warpgroups(0, jnp.maximum))
    quantized = (x_TU * broadcast_rows(1 / scale_T, shape)).astype(smem.x_smem.dtype)
    for step in range(own_steps):
        smem.x_smem[warpgroup * own_steps + step] = quantized[
            :, step * tile_k : (step + 1) * tile_k
        ]

    @pl.when((lax.axis_index("sm") == 0) & (warpgroup == 0))
    def _() -> None:
        if c.eps is None:
            refs.x_scale[...] = scale_T
        else:
            mean_T = reduce_over_warpgroups(1, jnp.add) * (1 / x.shape[1])
            refs.x_scale[...] = scale_T * lax.rsqrt(mean_T + c.eps)

    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.meeting.at[1])
    plgpu.barrier_wait(smem.meeting.at[1])
