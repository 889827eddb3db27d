"""Blocks of tokens times the matrices of their experts, on Hopper's tensor cores.

A block is a few slots whose tokens all want one expert. The kernel reads a list of which; of an
expert that no token wants it reads nothing. The weights are the left operand, 64 rows to an
instruction, and the tokens the right one, 8 to an instruction: so a decode step wastes little, and
the same kernel fills the tensor cores with a prompt.

One warpgroup copies and the others multiply. The copies run ahead, over the borders between items
of work, so that memory never waits for arithmetic. There are as many thread blocks as
multiprocessors.

Letters here: I blocks, T slots of a block, O what a matrix gives, U what it joins.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from l4jax.kernels.formats import find_factor
from l4jax.kernels.reference import Norm

_load: Any = plgpu.load  # whose parameters differ between versions of jax
_inline: Any = plgpu.inline_mgpu  # whose type knows no arguments

_INSTRUCTION_ROWS = 64
_LINE = 128  # bytes of a row that are swizzled together; what is joined comes in such lines
_COPY_REGISTERS = 40  # of a thread that copies
GROUP = 128  # of int4: neighbors that share a scale
SCALES = 4  # float32 that are copied at once: no copy is shorter than 16 bytes


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut into items of work.

    Attributes:
        rows: of the matrix; as many of them, a multiple of 64, to each warpgroup.
        depth: columns that are copied at once.
        stages: of such copies under way.
        splits: of the columns, each an item of its own; their results are yet to be added up.
        width: blocks that are multiplied side by side, so that they find the weights in L2.
        multipliers: warpgroups that multiply.
        is_held: whether all tokens stand in each block, and lie whole in shared memory.
    """

    rows: int
    depth: int
    stages: int
    splits: int = 1
    width: int = 1
    multipliers: int = 2
    is_held: bool = False


@functools.partial(jax.jit, static_argnames=("tiles", "dtype", "sms", "leading", "interpret"))
def multiply_blocks(
    x_ITU: Array,
    weights: tuple[Array, ...],
    scales: tuple[Array, ...],
    expert_I: Array,
    count: Array,
    *,
    tiles: Tiles,
    dtype: Any,
    sms: int,
    leading: int = 0,
    interpret: Any = None,
) -> Array:
    """Each block times the matrix of its expert.

    Args:
        x_ITU: the blocks: e4m3 where the weights are, else bfloat16; where they are int4, with its
            columns permuted.
        weights: stacks [E, O, U] of matrices, bfloat16, e4m3 or int4 all.
        scales: float32 stacks of their scales: of e4m3 [E, O], of int4 [E, O, L] with one for each
            128 columns; of bfloat16 none.
        expert_I: int32 expert of each block, counted through the stacks; of those behind the
            leading ones.
        count: int32 [1], how many blocks are multiplied; what the others give is undefined.
        tiles: how to cut.
        dtype: of the result; what is summed is float32.
        sms: multiprocessors of the device.
        leading: the first blocks, which all want the last matrix of all.
        interpret: what `pallas` interprets the kernel with, where there is no such device.

    Returns:
        [splits, I * T, O]: parts, to be added up; what the tokens are scaled by they are not.
    """
    blocks, slots, columns = x_ITU.shape
    x_SU = x_ITU.reshape(blocks * slots, columns)
    if weights[0].dtype == jnp.int4 and (missing := -scales[0].shape[2] % SCALES):
        scales = tuple(jnp.pad(scale, ((0, 0), (0, 0), (0, missing))) for scale in scales)
    case = x_SU, weights, scales, expert_I, count
    how: Any = dict(tiles=tiles, dtype=dtype, sms=sms, leading=leading, interpret=interpret)
    (out,) = _launch(*case, blocks=blocks, slots=slots, **how)
    return out


@functools.partial(
    jax.jit, static_argnames=("slots", "tiles", "dtype", "sms", "leading", "interpret")
)
def multiply_held(
    x_TU: Array,
    norm: Norm | None,
    weights: tuple[Array, ...],
    scales: tuple[Array, ...],
    expert_I: Array,
    count: Array,
    *,
    slots: int,
    tiles: Tiles,
    dtype: Any,
    sms: int,
    leading: int = 0,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """All tokens, in bfloat16, times the matrices of several experts in e4m3. Each multiprocessor
    reads and rounds the tokens for itself, while the first weights are on their way: it costs no
    launch.

    Args:
        x_TU: the tokens, no more than slots.
        norm: how they are read.
        slots: of a block, in the first of which the tokens stand in order.
        weights, scales, expert_I, count, tiles, dtype, sms, leading, interpret: as above.

    Returns:
        What `multiply_blocks` returns, and float32 scales of as many tokens as slots: those of no
        token are left in, since to cut them off would be a launch.
    """
    case = x_TU, weights, scales, expert_I, count
    how: Any = dict(tiles=tiles, dtype=dtype, sms=sms, leading=leading, interpret=interpret)
    return _launch(*case, norm=norm, blocks=leading + len(expert_I), slots=slots, **how)


def _launch(
    x_SU: Array,
    weights: tuple[Array, ...],
    scales: tuple[Array, ...],
    expert_I: Array,
    count: Array,
    *,
    norm: Norm | None = None,
    blocks: int,
    slots: int,
    tiles: Tiles,
    dtype: Any,
    sms: int,
    leading: int,
    interpret: Any,
) -> Any:
    """The kernel; x is the tokens themselves if the tiles say that they are held."""
    tokens, columns = x_SU.shape
    rows, weight_dtype = weights[0].shape[1], weights[0].dtype
    x_dtype = weight_dtype if tiles.is_held else x_SU.dtype
    row_tiles, steps = rows // tiles.rows, columns // (tiles.depth * tiles.splits)
    assert rows % tiles.rows == 0 and columns == steps * tiles.depth * tiles.splits
    stages, multipliers = tiles.stages, tiles.multipliers
    part = tiles.rows // multipliers  # rows of a warpgroup
    is_int4, groups = weight_dtype == jnp.int4, tiles.depth // GROUP
    # A stage is given back when the next one has come.
    assert stages > 1 and (not is_int4 or SCALES % groups == 0)
    # How many matrices lie in the stacks before, and in this one.
    sizes = [weight.shape[0] for weight in weights]
    stacks = [(sum(sizes[:at]), size) for at, size in enumerate(sizes)]

    def blocks_body(
        *refs: Any,
        w_smem: Any,
        x_smem: Any,
        out_smem: Any,
        full: Any,
        free: Any,
        scale_smem: Any = None,
        **meeting: Any,
    ) -> None:
        x, expert, counts, *others = refs
        inputs = len(weights) + len(scales)
        weight = None if norm is None else others.pop(inputs)
        matrices, (out, *x_scale) = others[: len(stacks)], others[inputs:]
        scale_refs = others[len(stacks) : inputs] or [None] * len(stacks)
        warpgroup, live = lax.axis_index("warpgroup"), counts[0]
        share = functools.partial(
            plgpu.nd_loop, (live * (row_tiles * tiles.splits),), collective_axes="sm"
        )

        def find_expert(block: Any) -> Any:
            if not leading:
                return expert[block]
            return jnp.where(block < leading, sum(sizes) - 1, expert[lax.max(block - leading, 0)])

        def locate(info: plgpu.NDLoopInfo) -> tuple[Any, Any, Any]:
            """The block, the tile of rows and the split of an item."""
            (item,) = info.index
            split, at = lax.rem(item, tiles.splits), lax.div(item, tiles.splits)
            band = lax.div(at, row_tiles * tiles.width)  # blocks side by side
            within = lax.rem(at, row_tiles * tiles.width)
            width = jnp.minimum(tiles.width, live - band * tiles.width)
            return band * tiles.width + lax.rem(within, width), lax.div(within, width), split

        @pl.when(warpgroup == multipliers)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @share()
            def _item(info: plgpu.NDLoopInfo) -> None:
                block, tile, split = locate(info)
                e, mine = find_expert(block), pl.ds(tile * tiles.rows, tiles.rows)

                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    at = info.local_index * steps + step
                    stage = lax.rem(at, stages)

                    @pl.when(at >= stages)
                    def _() -> None:
                        plgpu.barrier_wait(free.at[stage])

                    here = pl.ds((split * steps + step) * tiles.depth, tiles.depth)
                    group = (split * steps + step) * groups
                    those = pl.ds(group - lax.rem(group, SCALES), SCALES)
                    for w, scale, (before, size) in zip(matrices, scale_refs, stacks, strict=True):

                        @pl.when((e >= before) & (e < before + size))
                        def _(w: Any = w, scale: Any = scale, before: int = before) -> None:
                            plgpu.copy_gmem_to_smem(
                                w.at[e - before, mine, here], w_smem.at[stage], full.at[stage]
                            )
                            if is_int4:
                                plgpu.copy_gmem_to_smem(
                                    scale.at[e - before, mine, those],
                                    scale_smem.at[stage],
                                    full.at[stage],
                                )

                    if not tiles.is_held:
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(block * slots, slots), here],
                            x_smem.at[stage],
                            full.at[stage],
                        )

        @pl.when(warpgroup < multipliers)
        def _multiply() -> None:
            plgpu.set_max_registers(count_registers(multipliers), action="increase")
            mine = pl.ds(warpgroup * part, part)
            if tiles.is_held:
                read = None if norm is None else Norm(weight, norm.eps)
                _hold_tokens(x, read, x_smem, x_scale[0], tokens, multipliers, **meeting)

            def multiply(first: Any, split: Any) -> Any:
                """Both operands straight from shared memory, two stages at a time."""

                def run(acc: Any) -> Any:
                    @pl.loop(0, steps)
                    def _step(step: Array) -> None:
                        stage = lax.rem(first + step, stages)
                        plgpu.barrier_wait(full.at[stage])
                        here = x_smem.at[split * steps + step if tiles.is_held else stage]
                        plgpu.wgmma(acc, w_smem.at[stage, mine], here.transpose((1, 0)))
                        plgpu.wgmma_wait(1)

                        @pl.when(step > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(free.at[lax.rem(first + step - 1, stages)])

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[lax.rem(first + steps - 1, stages)])
                    return acc[...]

                return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((part, slots), jnp.float32))

            def read_scales(block: Any, tile: Any) -> Array:
                """Of this warpgroup's rows, one each."""
                e, here = find_expert(block), pl.ds(tile * tiles.rows + warpgroup * part, part)
                found = None
                for scale, (before, size) in zip(scale_refs, stacks, strict=True):
                    own = _load(
                        scale.at[jnp.clip(e - before, 0, size - 1), here],
                        layout=plgpu.Layout.WGMMA.reduce(1),
                        optimized=False,
                    )
                    # The compiler knows no select by a scalar.
                    own *= jnp.where((e >= before) & (e < before + size), 1.0, 0.0)
                    found = own if found is None else found + own
                assert found is not None
                return found

            def widen_and_multiply(first: Any, split: Any) -> Any:
                """The weights through registers, a group of columns at a time: their scales meet
                the sums, which are far fewer."""

                def widen(stage: Any, group: int) -> Array:
                    data = w_smem.at[stage, mine, pl.ds(group * GROUP, GROUP)]
                    return _widen(data, interpret)

                def run(step: Array, carry: Any) -> Any:
                    acc, wide, stage = carry
                    following = jnp.where(stage == stages - 1, 0, stage + 1)
                    column = lax.rem((split * steps + step) * groups, SCALES)
                    for group in range(groups):

                        def proceed(group: int = group) -> tuple[Array, Array]:
                            """The scales of this group and the weights of the next one."""
                            scale = scale_smem.at[stage, mine, pl.ds(column + group, 1)]
                            factor = _read_column(scale, interpret)
                            if group + 1 < groups:
                                return factor, widen(stage, group + 1)

                            @pl.when(step + 1 < steps)
                            def _() -> None:
                                plgpu.barrier_wait(full.at[following])

                            # Behind the last step whatever lies there: nothing of it is used.
                            return factor, widen(following, 0)

                        tokens = x_smem.at[stage, :, pl.ds(group * GROUP, GROUP)]
                        found, (factor, wide) = _multiply_from_registers(
                            wide, tokens.transpose((1, 0)), proceed, interpret
                        )
                        acc += found * spread(factor, found.shape)
                    plgpu.barrier_arrive(free.at[stage])
                    return acc, wide, following

                zeros = plgpu.layout_cast(jnp.zeros((part, slots), jnp.float32), plgpu.Layout.WGMMA)
                start = lax.rem(first, stages)
                plgpu.barrier_wait(full.at[start])
                return lax.fori_loop(0, steps, run, (zeros, widen(start, 0), start))[0]

            @share()
            def _item(info: plgpu.NDLoopInfo) -> None:
                block, tile, split = locate(info)
                first = info.local_index * steps
                if is_int4:
                    found = widen_and_multiply(first, split)
                elif scales:
                    factor = read_scales(block, tile)  # under way while the rows are multiplied
                    found = multiply(first, split)
                    found *= spread(factor, found.shape)
                else:
                    found = multiply(first, split)
                found = found.astype(dtype)
                for at in range(0, part, _INSTRUCTION_ROWS):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem.at[warpgroup].transpose((1, 0))[...] = plgpu.layout_cast(
                        found[at : at + _INSTRUCTION_ROWS], plgpu.Layout.WGMMA_TRANSPOSED
                    )
                    plgpu.commit_smem()
                    to = pl.ds(tile * tiles.rows + warpgroup * part + at, _INSTRUCTION_ROWS)
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[warpgroup], out.at[split, pl.ds(block * slots, slots), to]
                    )

            plgpu.wait_smem_to_gmem(0)

    def allocate(shape: tuple[int, ...], dtype: Any, line: int = _LINE) -> Any:
        return plgpu.SMEM(
            shape,
            dtype,
            transforms=(
                plgpu.TilingTransform((8, line * 8 // count_bits(dtype))),
                plgpu.SwizzleTransform(line),
            ),
        )

    out_types = [jax.ShapeDtypeStruct((tiles.splits, blocks * slots, rows), dtype)]
    scratch: dict[str, Any] = {}
    if is_int4:
        scratch["scale_smem"] = plgpu.SMEM((stages, tiles.rows, SCALES), jnp.float32)
    if tiles.is_held:
        out_types.append(jax.ShapeDtypeStruct((slots,), jnp.float32))
        scratch["found_smem"] = plgpu.SMEM(
            (1 + (norm is not None), multipliers, slots), jnp.float32
        )
        scratch["met"] = plgpu.Barrier(num_arrivals=multipliers, num_barriers=2)
    kernel = plgpu.kernel(
        blocks_body,
        out_type=out_types,
        grid=(sms,),
        grid_names=("sm",),
        num_threads=multipliers + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            # int4: lines as wide as a group, so that one can be read alone.
            w_smem=allocate(
                (stages, tiles.rows, tiles.depth),
                weight_dtype,
                GROUP // 2 if is_int4 else _LINE,
            ),
            x_smem=allocate(
                (columns // tiles.depth if tiles.is_held else stages, slots, tiles.depth), x_dtype
            ),
            out_smem=allocate((multipliers, slots, _INSTRUCTION_ROWS), dtype),
            full=plgpu.Barrier(num_arrivals=1 + (not tiles.is_held) + is_int4, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=multipliers, num_barriers=stages),
            **scratch,
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
    operands = x_SU, expert_I, count, *weights, *scales
    return kernel(*operands, *([] if norm is None else [norm.scale_D]))


# Of eight rows two to a warp, and a thread reads eight neighbors at once.
EIGHT_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, _LINE), (2, _LINE), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def load_row(ref: Any) -> Array:
    """For `stack_rows`."""
    return _load(ref, layout=EIGHT_ROWS.reduce(0), optimized=False)


def stack_rows(rows: list[Array]) -> Array:
    """Up to eight rows above each other; further ones are like the first."""
    shape = (8, *rows[0].shape)
    at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=EIGHT_ROWS)
    first, *others = (
        plgpu.layout_cast(lax.broadcast_in_dim(row, shape, [1]), EIGHT_ROWS) for row in rows
    )
    for place, row in enumerate(others, 1):
        first = jnp.where(at == place, row, first)
    return first


def _hold_tokens(
    x: Any,
    norm: Norm | None,
    x_smem: Any,
    scale: Any,
    tokens: int,
    warpgroups: int,
    *,
    found_smem: Any,
    met: Any,
) -> None:
    """Tokens rounded to e4m3 in shared memory, by warpgroups of which each has some columns. What a
    norm divides them by goes into their scales."""
    warpgroup = lax.axis_index("warpgroup")
    steps, slots, depth = x_smem.shape
    mine = steps // warpgroups
    # All in one array: Pallas looks for the layout of each for as long as there are others.
    shape, here = (slots, mine * depth), pl.ds(warpgroup * (mine * depth), mine * depth)
    if tokens == slots:
        found = _load(x.at[:, here], layout=EIGHT_ROWS, optimized=False)
    else:
        found = stack_rows([load_row(x.at[token, here]) for token in range(tokens)])
    wide = found.astype(jnp.float32)
    if norm is not None:
        weight = load_row(norm.scale_D.at[here])  # under way before anything is needed
        found_smem[1, warpgroup] = (wide * wide).sum(axis=1)
        wide *= stack_rows([weight]).astype(jnp.float32)
    found_smem[0, warpgroup] = jnp.abs(wide).max(axis=1)
    plgpu.barrier_arrive(met.at[0])
    plgpu.barrier_wait(met.at[0])

    def join_all(at: int, join: Any) -> Array:
        layout, refs = EIGHT_ROWS.reduce(1), [found_smem.at[at, one] for one in range(warpgroups)]
        return functools.reduce(join, [_load(x, layout=layout, optimized=False) for x in refs])

    factor_T = find_factor(join_all(0, jnp.maximum))
    rounded = (wide * spread(1 / factor_T, shape)).astype(x_smem.dtype)
    for step in range(mine):
        x_smem[warpgroup * mine + step] = rounded[:, step * depth : (step + 1) * depth]

    @pl.when((lax.axis_index("sm") == 0) & (warpgroup == 0))
    def _() -> None:
        if norm is None:
            scale[...] = factor_T
        else:
            mean_T = join_all(1, jnp.add) * (1 / x.shape[1])
            scale[...] = factor_T * lax.rsqrt(mean_T + norm.eps)

    plgpu.commit_smem()
    plgpu.barrier_arrive(met.at[1])
    plgpu.barrier_wait(met.at[1])


def spread(x_O: Array, shape: tuple[int, ...]) -> Array:
    """One number for each row, along all of it."""
    return lax.broadcast_in_dim(x_O, shape, [0])


def _multiply_from_registers(
    left: Array, right: Any, proceed: Callable[[], Any], interpret: Any
) -> tuple[Array, Any]:
    """The product of an array and what lies in shared memory, in float32, and what `proceed`
    returns, which it finds out meanwhile."""
    if interpret is not None:  # the interpreter knows wgmma on two references only
        return jnp.dot(left, right[...], preferred_element_type=jnp.float32), proceed()

    def run(acc: Any) -> Any:
        plgpu.wgmma(acc, left, right)
        meanwhile = proceed()
        return acc[...], meanwhile

    return pl.run_scoped(
        run, plgpu.WGMMAAccumulatorRef((left.shape[0], right.shape[1]), jnp.float32)
    )


# A thread reads 32 neighbors of a row at once, as four words. Of a word it masks the bits at one
# place of both halves, and what comes of that is what wgmma takes for neighbors: so no thread needs
# what another one read. The columns come in another order then, and the tokens' alike.
_WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, GROUP), (16, GROUP), (8, GROUP), (32,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# Where the last bits of a mantissa count ones, as under the exponent of 128 in bfloat16, four bits
# of two's complement with the sign flipped are 136 more than before.
_WIDEN_PTX = """{{
    .reg .b32 low, biased, bias;
    shr.u32 low, $1, {};
    lop3.b32 biased, low, 0x000F000F, 0x43084308, 0x6A;
    mov.b32 bias, 0x43084308;
    sub.bf16x2 $0, biased, bias;
}}"""


def permute_columns(x_SU: Any) -> Any:
    """Columns, of whatever stands before them, in the order in which int4 is widened."""
    # By thread, word, half of the word, and place in that.
    x_Ltwhp = x_SU.reshape(*x_SU.shape[:-1], -1, 4, 4, 2, 4)
    *others, t, w, h, p = range(x_Ltwhp.ndim)
    return x_Ltwhp.transpose(*others, w, p, t, h).reshape(x_SU.shape)


def _widen(data: Any, interpret: Any) -> Array:
    """Of int4 [rows, GROUP] in shared memory, bfloat16 with its columns permuted."""
    if interpret is not None:
        return permute_columns(data[...].astype(jnp.bfloat16))
    shape = data.shape

    @_inline(
        arg_types=(_WORDS,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def widen(_: Any, narrow: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        four_words = ir.VectorType.get((4,), i32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        # By 64 rows, 8 columns, and which half of a warp's 16 rows.
        wide = np.empty((shape[0] // _INSTRUCTION_ROWS, GROUP // 8, 2), object)
        for at, read in enumerate(narrow.registers.flat):
            words = llvm.bitcast(four_words, read)
            for word in range(4):
                bits = llvm.extractelement(words, mgpu.c(word, i32))
                for place in range(4):
                    found = llvm.inline_asm(i32, [bits], _WIDEN_PTX.format(4 * place), "=r,r")
                    wide[at // 2, 4 * word + place, at % 2] = llvm.bitcast(pair, found)
        layout = mgpu.WGMMA_LAYOUT
        registers = wide.reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return widen(_load(data, layout=_WORDS))


def _read_column(column: Any, interpret: Any) -> Array:
    """Of shared memory [rows, 1], as the rows of a product lie in registers."""
    if interpret is not None:
        return column[:, 0]
    layout = plgpu.Layout.WGMMA.reduce(1)

    # Pallas loads from shared memory only what is contiguous.
    @_inline(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(column.shape[:1], jnp.float32, layout),
    )
    def read(_: Any, ref: Any) -> Any:
        flat = mgpu.memref_slice(ref, (slice(None), 0))
        layout = mgpu.WGMMA_ROW_LAYOUT
        return mgpu.FragmentedArray.load_untiled(flat, layout=layout, optimized=False)

    return read(column)


def count_registers(computing: int) -> int:
    """Registers of a thread of so many warpgroups beside one that copies.

    A thread block is launched with as many for each thread as there are, in eights; one that waits
    for more than the others give back waits for ever.
    """
    warpgroups = computing + 1
    launched = 65536 // (128 * warpgroups) // 8 * 8
    return min(232, (launched * warpgroups - _COPY_REGISTERS) // computing // 8 * 8)


def count_bits(dtype: Any) -> int:
    """Bits of an element in memory."""
    return 4 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize * 8
