"""int4 dequantization in registers, for the left operand of wgmma.

    thread    reads 32 neighbors of a row, as four 32-bit words
    word      shift by 0, 4, 8 or 12 bits, mask 0x000F000F: one nibble of each half
    PTX       lop3 (mask, or 0x43084308, flip signs) and sub.bf16x2: two bfloat16 in 3 instructions
    register  the pair stands where wgmma expects two neighboring columns

No thread needs a value that another thread read. The columns come out permuted, so the tokens'
columns are permuted alike (`permute_columns`). Scales multiply the accumulator, which is far
smaller than the weights.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from l4jax.config import INT4_GROUP
from l4jax.kernels.hopper.mosaic import BY_ROW, WGMMA_ROWS, inline_mgpu, load

_WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, INT4_GROUP), (16, INT4_GROUP), (8, INT4_GROUP), (32,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# Under the exponent of 128 the last mantissa bits of bfloat16 count ones: four bits of two's
# complement with the sign flipped read as the value plus 136.
_DEQUANTIZE_PTX = """{{
    .reg .b32 low, biased, bias;
    shr.u32 low, $1, {};
    lop3.b32 biased, low, 0x000F000F, 0x43084308, 0x6A;
    mov.b32 bias, 0x43084308;
    sub.bf16x2 $0, biased, bias;
}}"""


def permute_columns(x_SU: Any) -> Any:
    """Permute the columns [.., U] into the order in which `dequantize` gives them."""
    # By thread, word, half of the word, and place in the half.
    x_Ltwhp = x_SU.reshape(*x_SU.shape[:-1], -1, 4, 4, 2, 4)
    *others, t, w, h, p = range(x_Ltwhp.ndim)
    return x_Ltwhp.transpose(*others, w, p, t, h).reshape(x_SU.shape)


def dequantize(data: Any, interpret: Any) -> Array:
    """Load int4 [rows, INT4_GROUP] from shared memory as unscaled bfloat16, columns permuted."""
    if interpret is not None:
        return permute_columns(data[...].astype(jnp.bfloat16))
    shape = data.shape

    @inline_mgpu(
        arg_types=(_WORDS,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def convert(_: Any, int4: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        four_words = ir.VectorType.get((4,), i32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        # By 64 rows, 8 columns, and half of a warp's 16 rows.
        pairs = np.empty((shape[0] // WGMMA_ROWS, INT4_GROUP // 8, 2), object)
        for at, read in enumerate(int4.registers.flat):
            words = llvm.bitcast(four_words, read)
            for word in range(4):
                bits = llvm.extractelement(words, mgpu.c(word, i32))
                for place in range(4):
                    ptx = _DEQUANTIZE_PTX.format(4 * place)
                    converted = llvm.inline_asm(i32, [bits], ptx, "=r,r")
                    pairs[at // 2, 4 * word + place, at % 2] = llvm.bitcast(pair, converted)
        layout = mgpu.WGMMA_LAYOUT
        registers = pairs.reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return convert(load(data, layout=_WORDS))


def load_scales(column: Any, interpret: Any) -> Array:
    """Load a column [rows, 1] of scales from shared memory, one per row of a wgmma accumulator."""
    if interpret is not None:
        return column[:, 0]

    # Pallas loads contiguous shared memory only.
    @inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(column.shape[:1], jnp.float32, BY_ROW),
    )
    def read(_: Any, ref: Any) -> Any:
        flat = mgpu.memref_slice(ref, (slice(None), 0))
        layout = mgpu.WGMMA_ROW_LAYOUT
        return mgpu.FragmentedArray.load_untiled(flat, layout=layout, optimized=False)

    return read(column)


def multiply_from_registers(
    left: Array, right: Any, proceed: Callable[[], Any], interpret: Any
) -> tuple[Array, Any]:
    """Multiply registers by shared memory, in float32, and run `proceed` while wgmma is in flight.

    Returns:
        The product, and the result of `proceed`.
    """
    if interpret is not None:  # the interpreter knows wgmma of two references only
        return jnp.dot(left, right[...], preferred_element_type=jnp.float32), proceed()

    def run(acc: Any) -> Any:
        plgpu.wgmma(acc, left, right)
        meanwhile = proceed()
        return acc[...], meanwhile

    return pl.run_scoped(
        run, plgpu.WGMMAAccumulatorRef((left.shape[0], right.shape[1]), jnp.float32)
    )
