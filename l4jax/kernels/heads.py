"""What becomes of heads between their projection and attention, in one launch.

Plain XLA makes a launch of the sums, one of the norms, one of what uses both and one that writes
pages; and reads and writes a prompt's heads in each of them. Here a thread block has the queries,
the key and the value of one token and one kv head, eight rows in registers.

Letters here: P parts of a product, S slots, of which the tokens are the first; U rows of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

from l4jax.kernels.blocks import EIGHT_ROWS, load_row, spread, stack_rows
from l4jax.kernels.formats import saturating_cast
from l4jax.kernels.reference import HeadTransform

_inline: Any = plgpu.inline_mgpu  # whose type knows no arguments

_BLOCK = 8  # rows of a warpgroup, which lie together in shared memory where they are read


@functools.partial(jax.jit, static_argnames="interpret")
def place_heads(
    parts_PSKJH: Array,
    scale_S: Array | None,
    scale_KJH: Array | None,
    turn: HeadTransform,
    k_PKZH: Array,
    v_PKZH: Array,
    table_RB: Array,
    row_T: Array,
    position_T: Array,
    *,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """What follows the product in `reference.project_heads`, and `reference.store` in place.

    Args:
        parts_PSKJH: the product's parts, to be added up; of each kv head the queries, the key and
            the value, each as wide as a line of 128.
        scale_S, scale_KJH: float32, what they are yet to be multiplied by, where they are.
        turn, k_PKZH, v_PKZH, table_RB, row_T, position_T: as there.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [T, K, U, H]: of each kv head the same rows, as they are attended and stored,
        filled up to whole blocks with what is finite. And the pool's arrays with the writes done.
    """
    parts, _, kv_heads, rows, head_dim = parts_PSKJH.shape
    (tokens,), (pages, _, page, _) = row_T.shape, k_PKZH.shape
    height, key = -(-rows // _BLOCK) * _BLOCK, rows - 2
    operands = {"table": table_RB, "row": row_T, "position": position_T}
    if scale_S is not None:
        operands["scale"] = scale_S
    if scale_KJH is not None:
        operands["columns"] = scale_KJH
    if turn.angle_TH is not None:
        angle_TH = jnp.repeat(turn.angle_TH, 2, axis=1)  # one for each of a pair
        sign_H = np.tile(np.array([-1, 1], np.float32), head_dim // 2)
        operands |= {"cos": jnp.cos(angle_TH), "sin": jnp.sin(angle_TH) * sign_H}
    if turn.factor_T is not None:
        operands["factor"] = turn.factor_T
    if turn.scales is not None:
        operands["stored"] = jnp.stack(turn.scales).astype(jnp.bfloat16).astype(jnp.float32)
    pools = jax.new_ref(k_PKZH), jax.new_ref(v_PKZH)  # what the kernel writes to is not copied

    def place_body(x: Any, *refs: Any, rows_smem: Any) -> None:
        of = dict(zip(operands, refs, strict=False))
        *to, out = refs[len(operands) :]
        token, head = lax.axis_index("token"), lax.axis_index("head")
        shape = (_BLOCK, head_dim)
        position = of["position"][token]  # under way, as the page is, while the rows are turned
        column = jnp.clip(lax.div(position, page), 0, table_RB.shape[1] - 1)
        place = of["table"][of["row"][token], column]

        def find_rows(first: int) -> Array:
            """Eight rows, rounded wherever the definition rounds."""
            at = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=EIGHT_ROWS)

            def read(row: int) -> Array:
                each = [load_row(x.at[p, token, head, row]) for p in range(parts)]
                row_H = functools.reduce(jnp.add, (part_H.astype(jnp.float32) for part_H in each))
                return row_H * load_row(of["columns"].at[head, row]) if "columns" in of else row_H

            wide = stack_rows([read(row) for row in range(first, min(first + _BLOCK, rows))])
            wide = _round(wide * of["scale"][token] if "scale" in of else wide)
            turned = wide
            if "cos" in of:
                cos, sin = (stack_rows([load_row(of[name].at[token])]) for name in ("cos", "sin"))
                turned = _round(turned * cos + _swap_pairs(turned, interpret) * sin)
            if turn.eps is not None:
                mean = jnp.sum(turned * turned, axis=1) * (1 / head_dim)
                turned = _round(turned * spread(lax.rsqrt(mean + turn.eps), shape))
            if "factor" in of:
                turned = jnp.where(at < key, _round(turned * of["factor"][token]), turned)
            wide = jnp.where(at <= key, turned, wide)
            if "stored" in of:
                k_scale, v_scale = of["stored"][0], of["stored"][1]
                divided = wide / jnp.where(at == key, k_scale, v_scale)
                wide = _round(jnp.where(at < key, wide * k_scale, divided))
            return wide

        for first in range(0, height, _BLOCK):
            wide = find_rows(first)
            out[token, head, pl.ds(first, _BLOCK)] = wide.astype(jnp.bfloat16)
            rows_smem[pl.ds(first, _BLOCK)] = wide

        @pl.when((position >= 0) & (place >= 0) & (place < pages))
        def _() -> None:
            for row, pool in enumerate(to, key):
                pool[place, head, lax.rem(position, page)] = saturating_cast(
                    rows_smem[row], pool.dtype
                )

    kernel = plgpu.kernel(
        place_body,
        out_type=jax.ShapeDtypeStruct((tokens, kv_heads, height, head_dim), jnp.bfloat16),
        grid=(tokens, kv_heads),
        grid_names=("token", "head"),
        scratch_types=dict(rows_smem=plgpu.SMEM((height, head_dim), jnp.float32)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    x_TKUH = kernel(parts_PSKJH, *operands.values(), *pools)
    return x_TKUH, pools[0][...], pools[1][...]


def _round(x: Array) -> Array:
    """To bfloat16, and wide again."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _swap_pairs(x: Array, interpret: Any) -> Array:
    """The other one of each pair of neighbors: a thread has both."""
    if interpret is not None:
        return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)

    @_inline(
        arg_types=(EIGHT_ROWS,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, EIGHT_ROWS),
    )
    def swap(_: Any, x: Any) -> Any:
        registers = np.empty_like(x.registers)
        for at, eight in np.ndenumerate(x.registers):
            registers[at] = vector.shuffle(eight, eight, [1, 0, 3, 2, 5, 4, 7, 6])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return swap(x)
