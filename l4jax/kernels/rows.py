"""Small work between two products, a row to a thread block, so that it is one launch each.

A row is read once, stays in registers, and is written once. Plain XLA makes two or three launches
of the same, and in a decode step of one token a launch costs more than what it does.

So few rows leave the device empty, and what costs is waiting. Hence a row is cut into shares: each
has a warpgroup of its own in the row's thread block or, where nothing is joined over the row, even
a thread block of its own. Of a share each warp has a line. Many rows fill the device by themselves,
and warpgroups that wait for each other are then what costs.

Letters here: S slots, O what the product before gave, U what the one behind it joins, W warps of a
warpgroup, L elements of a line.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.formats import FP8, find_factor

_load: Any = plgpu.load  # whose parameters differ between versions of jax

_WARPS = 4  # of a warpgroup
_MOST_SHARES = 5  # of a row: each warp reads what every other one found
_FEW_ROWS = 64  # which leave the device empty
_ROUTED = 8  # experts whose scores are found at once: what a thread can hold
_VECTOR = 8  # elements that a thread reads at once: of bfloat16 16 bytes, and none reads more


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def normalize_rows(x_TU: Array, scale_U: Array, *, eps: float, interpret: Any = None) -> Array:
    """`reference.normalize` of bfloat16."""
    rows, width = x_TU.shape

    def norm_body(x: Any, scale: Any, out: Any, **meeting: Any) -> None:
        row, share = lax.axis_index("row"), lax.axis_index("share")
        found, weight = _read(x.at[row, share]), _read(scale.at[share])
        total = _join(jnp.sum(found * found, axis=1), jnp.add, share, **meeting)
        # Rounded before the weight as behind it, as the definition is.
        normed = (found * lax.rsqrt(total * (1 / width) + eps)).astype(jnp.bfloat16)
        out[row, share] = (normed.astype(jnp.float32) * weight).astype(out.dtype)

    cut = _cut(width, rows)
    operands = x_TU.reshape(rows, *cut), scale_U.reshape(cut)
    return _launch(norm_body, *operands, rows=rows, out=(rows, *cut), interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def route_rows(
    x_TU: Array, router_EU: Array, *, interpret: Any = None
) -> tuple[Array, Array, Array]:
    """`reference.route` of bfloat16, a warpgroup to a token."""
    (tokens, width), experts = x_TU.shape, router_EU.shape[0]

    def route_body(
        x: Any, router: Any, score: Any, expert: Any, gate: Any, *, found_smem: Any, met: Any
    ) -> None:
        token = lax.axis_index("row")
        mine, found = _read(x.at[token]), []
        for first in range(0, experts, _ROUTED):
            several = range(first, min(first + _ROUTED, experts))
            theirs = [_read(router.at[at]) for at in several]  # all under way before any is needed
            found += [jnp.sum(mine * weight, axis=1) for weight in theirs]
        for at, found_W in enumerate(found):
            found_smem[at] = found_W
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        best, highest = jnp.int32(0), jnp.float32(-jnp.inf)
        for at in range(experts):
            one, two, three, four = (found_smem[at, warp] for warp in range(_WARPS))
            # Rounded before they are compared, as the definition is.
            total = ((one + two) + (three + four)).astype(jnp.bfloat16)
            score[token, at] = total
            total = total.astype(jnp.float32)
            best = jnp.where(total > highest, at, best)
            highest = jnp.maximum(highest, total)
        expert[token] = best
        gate[token] = 1 / (1 + jnp.exp(-highest))

    kernel = plgpu.kernel(
        route_body,
        out_type=[
            jax.ShapeDtypeStruct((tokens, experts), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        ],
        grid=(tokens,),
        grid_names=("row",),
        num_threads=1,
        thread_name="share",
        scratch_types=dict(
            found_smem=plgpu.SMEM((experts, _WARPS), jnp.float32),
            met=plgpu.Barrier(num_arrivals=1),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )
    cut = _WARPS, width // _WARPS
    return tuple(kernel(x_TU.reshape(tokens, *cut), router_EU.reshape(experts, *cut)))


@functools.partial(jax.jit, static_argnames=("slots", "has_leading", "interpret"))
def round_rows(
    x_TU: Array,
    slot_T: Array | None = None,
    *,
    slots: int,
    has_leading: bool = False,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """`formats.quantize_tokens`, of each token in its slot.

    Args:
        x_TU: the tokens.
        slot_T: int32 slot of each, where these are not the first ones in order.
        slots: how many there are; what stands in one that no token has is undefined.
        has_leading: whether each token also stands in the first slots, in order.
        interpret: as for the other kernels.

    Returns:
        e4m3 [S, U], and the float32 scale of each token.
    """
    tokens, width = x_TU.shape
    cut = _cut(width, tokens)

    def round_body(x: Any, *refs: Any, **meeting: Any) -> None:
        *slot_of, out, scale = refs
        token, share = lax.axis_index("row"), lax.axis_index("share")
        data, factor = _round(_read(x.at[token, share]), share, **meeting)
        for slot in slot_of:
            out[slot[token], share] = data
        if has_leading or not slot_of:
            out[token, share] = data
        _write_once(scale, token, factor, share)

    return _launch(
        round_body,
        x_TU.reshape(tokens, *cut),
        *([] if slot_T is None else [slot_T]),
        rows=tokens,
        out=(slots, *cut),
        scaled=tokens,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("has_leading", "is_rounded", "interpret"))
def activate_rows(
    parts_PSO: Array,
    scale_T: Array | None = None,
    gate_T: Array | None = None,
    scale_O: Array | None = None,
    slot_T: Array | None = None,
    *,
    has_leading: bool = False,
    is_rounded: bool,
    interpret: Any = None,
) -> Any:
    """`silu(gate) * up` of a product's parts, O = 2 U with the gates first.

    Args:
        parts_PSO: the parts, to be added up.
        scale_T, scale_O: float32, what the sums are multiplied by, where they are. The former may
            be longer than there are tokens.
        gate_T: float32, what they are multiplied by beside that: the router's gates, which scale
            what comes in, and a product is linear in it.
        slot_T: int32, the slots of the tokens; without it they stand in order.
        has_leading: whether they stand in the first slots, too; there no gate scales them.
        is_rounded: to e4m3, with a scale for each slot.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [S, U]; or e4m3 and float32 [S]. Of slots without a token it is undefined.
    """
    parts, slots, outs = parts_PSO.shape
    half = outs // 2
    tokens = slots if slot_T is None else len(slot_T)
    rows = tokens * (2 if has_leading else 1)
    # With scales for each column a thread has as much to read for half as many elements.
    cut = _cut(half, rows, 2 if scale_O is None else 1) if is_rounded else _cut(half)
    operands = {
        "slot": slot_T,
        "scale": scale_T,
        "gate": gate_T,
        "columns": None if scale_O is None else scale_O.reshape(2, *cut),
    }
    operands = {name: x for name, x in operands.items() if x is not None}

    def activate_body(x: Any, *refs: Any, **meeting: Any) -> None:
        row, share = lax.axis_index("row"), lax.axis_index("share")
        found, out = dict(zip(operands, refs, strict=False)), refs[len(operands) :]
        token, slot = _place(row, tokens, found.get("slot"), has_leading)
        factor = found["scale"][token] if "scale" in found else None
        if "gate" in found:
            mine = jnp.where(row < rows - tokens, 1.0, found["gate"][token])
            factor = mine if factor is None else factor * mine

        def read(which: int) -> Array:
            total = _read(x.at[0, slot, which, share])
            for at in range(1, parts):
                total += _read(x.at[at, slot, which, share])
            if factor is not None:
                total *= factor
            return total * _read(found["columns"].at[which, share]) if "columns" in found else total

        gate, up = read(0), read(1)  # both under way before any of it is needed
        # Rounded once to bfloat16, as the product of other kernels is.
        hidden = (gate * (1 / (1 + jnp.exp(-gate))) * up).astype(jnp.bfloat16)
        if is_rounded:
            out[0][slot, share], scale = _round(hidden.astype(jnp.float32), share, **meeting)
            _write_once(out[1], slot, scale, share)
        else:
            out[0][slot, share] = hidden

    return _launch(
        activate_body,
        parts_PSO.reshape(parts, slots, 2, *cut),
        *operands.values(),
        rows=rows,
        out=(slots, *cut),
        is_joined=is_rounded,
        scaled=slots if is_rounded else 0,
        interpret=interpret,
    )


def _place(row: Any, tokens: int, slot_T: Any, has_leading: bool) -> tuple[Any, Any]:
    """The token of a row of work and its slot; with leading slots the first rows stand there."""
    if slot_T is None:
        return row, row
    if not has_leading:
        return row, slot_T[row]
    token = lax.rem(row, tokens)
    return token, jnp.where(row < tokens, row, slot_T[token])


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def join_rows(
    parts: Array, peaks: Array, totals: Array, *, heads: int, interpret: Any = None
) -> Array:
    """Attention over parts of the positions, joined: each part weighs as its softmax did.

    Args:
        parts: float32 [parts, T, K, U, H], not yet divided by the totals.
        peaks, totals: float32 [parts, T, K, U..] of each part's softmax, in powers of two.
        heads: how many of U count.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [T * K * G, H].
    """
    count, tokens, kv_heads, _, head_dim = parts.shape

    def join_body(part: Any, peak: Any, total: Any, out: Any) -> None:
        row, mine = lax.axis_index("row"), lax.axis_index("share")
        head, at = lax.rem(row, heads), lax.div(row, heads)
        here = lax.div(at, kv_heads), lax.rem(at, kv_heads), head
        found = [_read(part.at[p, *here, mine]) for p in range(count)]
        highest = [peak[p, *here] for p in range(count)]
        top = functools.reduce(jnp.maximum, highest)
        weights = [jnp.exp2(x - top) for x in highest]
        whole = sum(w * total[p, *here] for p, w in enumerate(weights))
        joined = sum(w * x for w, x in zip(weights, found, strict=True))
        out[row, mine] = (joined / jnp.maximum(whole, 1e-30)).astype(jnp.bfloat16)

    rows, cut = tokens * kv_heads * heads, _cut(head_dim)
    operands = parts.reshape(*parts.shape[:-1], *cut), peaks, totals
    return _launch(
        join_body, *operands, rows=rows, out=(rows, *cut), is_joined=False, interpret=interpret
    )


def _cut(width: int, rows: int = 0, of_many: int = 1) -> tuple[int, int, int]:
    """The shares of a row, the lines of a share and the elements of a line. As many shares as leave
    each thread something to read at full width; no more than `of_many` where so many rows that are
    joined fill the device."""
    full = _WARPS * 32 * _VECTOR
    most = _MOST_SHARES if rows <= _FEW_ROWS else of_many
    shares = max((n for n in range(2, most + 1) if width % (n * full) == 0), default=1)
    return shares, _WARPS, width // (shares * _WARPS)


def _read(ref: Any) -> Array:
    """A share of a row, [W, L] in float32."""
    vector = math.gcd(ref.shape[-1] // 32, _VECTOR)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_WARPS, 32 * vector), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    return _load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _join(found_W: Array, join: Any, share: Any, *, found_smem: Any, met: Any) -> Any:
    """What each warp found in its line, joined over the row; once in a kernel.

    Nothing else may be joined over warps: Pallas would do it in shared memory that it gives to all
    warpgroups alike.
    """
    found_smem[share] = found_W
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)
    shares, warps = found_smem.shape
    found = [found_smem[at, warp] for at in range(shares) for warp in range(warps)]
    while len(found) > 1:  # in pairs: in a chain each would wait for the one before
        pairs = itertools.zip_longest(found[::2], found[1::2])
        found = [one if other is None else join(one, other) for one, other in pairs]
    return found[0]


def _round(x_WL: Array, share: Any, **meeting: Any) -> tuple[Array, Any]:
    """A share in e4m3, and the scale of its row."""
    largest = _join(jnp.max(jnp.abs(x_WL), axis=1), jnp.maximum, share, **meeting)
    factor = find_factor(largest)
    # Nothing is clipped: what came out a little above the largest e4m3 is rounded to it.
    return (x_WL * (1 / factor)).astype(FP8), factor


def _write_once(ref: Any, at: Any, value: Any, share: Any) -> None:
    @pl.when(share == 0)
    def _() -> None:
        ref[at] = value


def _launch(
    body: Any,
    *operands: Array,
    rows: int,
    out: tuple[int, ...],
    is_joined: bool = True,
    scaled: int = 0,
    interpret: Any,
) -> Any:
    """The body on each share of each row; `out` is the shape of what is written, cut into shares:
    bfloat16 or, with scales of so many, e4m3. What is joined over a row has warpgroups for its
    shares, and where these meet."""
    written, *cut = out
    out_types = [jax.ShapeDtypeStruct(out, FP8 if scaled else jnp.bfloat16)]
    if scaled:
        out_types.append(jax.ShapeDtypeStruct((scaled,), jnp.float32))
    launch: Any = dict(grid=(rows, cut[0]), grid_names=("row", "share"))
    if is_joined:
        launch = dict(
            grid=(rows,),
            grid_names=("row",),
            num_threads=cut[0],
            thread_name="share",
            scratch_types=dict(
                found_smem=plgpu.SMEM(tuple(cut[:2]), jnp.float32),
                met=plgpu.Barrier(num_arrivals=cut[0]),
            ),
        )
    kernel = plgpu.kernel(
        body,
        out_type=out_types,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
        **launch,
    )
    found, *scales = kernel(*operands)
    found = found.reshape(written, -1)
    return (found, *scales) if scaled else found
