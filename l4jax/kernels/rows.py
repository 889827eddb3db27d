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
from l4jax.kernels.reference import Norm

_load: Any = plgpu.load  # whose parameters differ between versions of jax

_WARPS = 4  # of a warpgroup
THREADS = 32 * _WARPS  # what a row is a multiple of
_MOST_SHARES = 5  # of a row: each warp reads what every other one found
_FEW_ROWS = 64  # which leave the device empty
_ROUTERS = 4  # warpgroups that find scores of a token
_AHEAD = 4  # experts whose weights are under way to each: what a thread can hold
_VECTOR = 8  # elements that a thread reads at once: of bfloat16 16 bytes, and none reads more
_COMPILED = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    unsafe_no_auto_barriers=True,
)


@functools.partial(jax.jit, static_argnames="interpret")
def normalize_rows(x_TU: Array, norm: Norm, *, interpret: Any = None) -> Array:
    """`reference.normalize` of bfloat16."""
    rows, width = x_TU.shape

    def norm_body(x: Any, scale: Any, out: Any, **meeting: Any) -> None:
        row, share = lax.axis_index("row"), lax.axis_index("share")
        found, weight = _read(x.at[row, share]), _read(scale.at[share])
        (square,) = _join(share, (jnp.sum(found * found, axis=1), jnp.add), **meeting)
        # Rounded before the weight as behind it, as the definition is.
        normed = (found * lax.rsqrt(square * (1 / width) + norm.eps)).astype(jnp.bfloat16)
        out[row, share] = (normed.astype(jnp.float32) * weight).astype(out.dtype)

    cut = _cut(width, rows)
    operands = x_TU.reshape(rows, *cut), norm.scale_D.reshape(cut)
    return _launch(norm_body, *operands, rows=rows, out=(rows, *cut), interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def route_rows(
    x_TU: Array, norm: Norm | None, router_EU: Array, *, interpret: Any = None
) -> tuple[Array, Array, Array]:
    """`reference.route` of bfloat16: a thread block to a token, in which each warpgroup finds the
    scores of some experts. What a norm divides a token by, it divides the scores by."""
    (tokens, width), experts = x_TU.shape, router_EU.shape[0]
    shares = math.gcd(experts, _ROUTERS)

    def route_body(x: Any, router: Any, *refs: Any, found_smem: Any, met: Any) -> None:
        *scales, score, expert, gate = refs
        token, share = lax.axis_index("row"), lax.axis_index("share")
        places = [share * (experts // shares) + at for at in range(experts // shares)]
        mine, weights = _read(x.at[token]), [_read(scale) for scale in scales]
        theirs = [_read(router.at[at]) for at in places[:_AHEAD]]
        found_smem[experts + share] = jnp.sum(mine * mine, axis=1)
        for weight in weights:
            mine *= weight
        for at, place in enumerate(places):
            found_smem[place] = jnp.sum(mine * theirs[at], axis=1)
            theirs += [_read(router.at[following]) for following in places[at + _AHEAD :][:1]]
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

        def join(at: int) -> Any:
            one, two, three, four = (found_smem[at, warp] for warp in range(_WARPS))
            return (one + two) + (three + four)

        @pl.when(share == 0)
        def _choose() -> None:
            factor = 1.0 if norm is None else lax.rsqrt(join(experts) * (1 / width) + norm.eps)
            best, highest = jnp.int32(0), jnp.float32(-jnp.inf)
            for at in range(experts):
                # Rounded before they are compared, as the definition is.
                total = (join(at) * factor).astype(jnp.bfloat16)
                score[token, at] = total
                total = total.astype(jnp.float32)
                best = jnp.where(total > highest, at, best)
                highest = jnp.maximum(highest, total)
            expert[token] = best
            gate[token] = 1 / (1 + jnp.exp(-highest))

    cut = _WARPS, width // _WARPS
    kernel = plgpu.kernel(
        route_body,
        out_type=[
            jax.ShapeDtypeStruct((tokens, experts), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        ],
        grid=(tokens,),
        grid_names=("row",),
        num_threads=shares,
        thread_name="share",
        scratch_types=dict(
            found_smem=plgpu.SMEM((experts + shares, _WARPS), jnp.float32),
            met=plgpu.Barrier(num_arrivals=shares),
        ),
        compiler_params=_COMPILED,
        interpret=interpret,
    )
    scales = [] if norm is None else [norm.scale_D.reshape(cut)]
    operands = x_TU.reshape(tokens, *cut), router_EU.reshape(experts, *cut), *scales
    return tuple(kernel(*operands))


@functools.partial(jax.jit, static_argnames=("slots", "has_leading", "interpret"))
def round_rows(
    x_TU: Array,
    norm: Norm | None = None,
    slot_T: Array | None = None,
    *,
    slots: int,
    has_leading: bool = False,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """`formats.quantize_tokens`, of each token in its slot. What a norm divides it by goes into its
    scale.

    Args:
        x_TU: the tokens.
        norm: how they are read.
        slot_T: int32 slot of each, where these are not the first ones in order.
        slots: how many there are; what stands in one that no token has is undefined.
        has_leading: whether each token also stands in the first slots, in order.
        interpret: as for the other kernels.

    Returns:
        e4m3 [S, U], and the float32 scale of each token.
    """
    tokens, width = x_TU.shape
    cut = _cut(width, tokens)
    operands = {
        "slot": slot_T,
        "weight": None if norm is None else norm.scale_D.reshape(cut),
    }
    operands = {name: x for name, x in operands.items() if x is not None}

    def round_body(x: Any, *refs: Any, **meeting: Any) -> None:
        of, (out, scale) = dict(zip(operands, refs, strict=False)), refs[len(operands) :]
        token, share = lax.axis_index("row"), lax.axis_index("share")
        wide, sums = _read(x.at[token, share]), []
        if norm is not None:
            sums = [(jnp.sum(wide * wide, axis=1), jnp.add)]
            wide *= _read(of["weight"].at[share])
        data, factor, *squares = _round(wide, share, *sums, **meeting)
        if norm is not None:
            factor *= lax.rsqrt(squares[0] * (1 / width) + norm.eps)
        if "slot" in of:
            out[of["slot"][token], share] = data
        if has_leading or "slot" not in of:
            out[token, share] = data
        _write_once(scale, token, factor, share)

    return _launch(
        round_body,
        x_TU.reshape(tokens, *cut),
        *operands.values(),
        rows=tokens,
        out=(slots, *cut),
        scaled=tokens,
        joins=1 if norm is None else 2,
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
        joins=1 if is_rounded else 0,
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


@functools.partial(jax.jit, static_argnames="interpret")
def join_rows(parts: Array, peaks: Array, totals: Array, *, interpret: Any = None) -> Array:
    """Attention over parts of the positions, joined: each part weighs as its softmax did.

    Args:
        parts: float32 [parts, T, K, G, H], not yet divided by the totals.
        peaks, totals: float32 [parts, T, K, G..] of each part's softmax, in powers of two.
        interpret: as for the other kernels.

    Returns:
        bfloat16 [T * K * G, H].
    """
    count, tokens, kv_heads, heads, head_dim = parts.shape

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
    return _launch(join_body, *operands, rows=rows, out=(rows, *cut), joins=0, interpret=interpret)


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


def _join(share: Any, *finds: tuple[Array, Any], found_smem: Any, met: Any) -> list[Any]:
    """What each warp found in its line, and how that is joined over the row; once in a kernel.

    Nothing else may be joined over warps: Pallas would do it in shared memory that it gives to all
    warpgroups alike.
    """
    for at, (found_W, _) in enumerate(finds):
        found_smem[at, share] = found_W
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)
    _, shares, warps = found_smem.shape

    def join_all(at: int, join: Any) -> Any:
        found = [found_smem[at, other, warp] for other in range(shares) for warp in range(warps)]
        while len(found) > 1:  # in pairs: in a chain each would wait for the one before
            pairs = itertools.zip_longest(found[::2], found[1::2])
            found = [one if other is None else join(one, other) for one, other in pairs]
        return found[0]

    return [join_all(at, join) for at, (_, join) in enumerate(finds)]


def _round(x_WL: Array, share: Any, *finds: tuple[Array, Any], **meeting: Any) -> list[Any]:
    """A share in e4m3, the scale of its row, and what else is joined with it."""
    largest, *others = _join(
        share, (jnp.max(jnp.abs(x_WL), axis=1), jnp.maximum), *finds, **meeting
    )
    factor = find_factor(largest)
    # Nothing is clipped: what came out a little above the largest e4m3 is rounded to it.
    return [(x_WL * (1 / factor)).astype(FP8), factor, *others]


def _write_once(ref: Any, at: Any, value: Any, share: Any) -> None:
    @pl.when(share == 0)
    def _() -> None:
        ref[at] = value


def _launch(
    body: Any,
    *operands: Array,
    rows: int,
    out: tuple[int, ...],
    joins: int = 1,
    scaled: int = 0,
    interpret: Any,
) -> Any:
    """The body on each share of each row; `out` is the shape of what is written, cut into shares:
    bfloat16 or, with scales of so many, e4m3. Where so many things are joined over a row, its
    shares have warpgroups, and these a place to meet."""
    written, *cut = out
    out_types = [jax.ShapeDtypeStruct(out, FP8 if scaled else jnp.bfloat16)]
    if scaled:
        out_types.append(jax.ShapeDtypeStruct((scaled,), jnp.float32))
    launch: Any = dict(grid=(rows, cut[0]), grid_names=("row", "share"))
    if joins:
        launch = dict(
            grid=(rows,),
            grid_names=("row",),
            num_threads=cut[0],
            thread_name="share",
            scratch_types=dict(
                found_smem=plgpu.SMEM((joins, *cut[:2]), jnp.float32),
                met=plgpu.Barrier(num_arrivals=cut[0]),
            ),
        )
    kernel = plgpu.kernel(
        body,
        out_type=out_types,
        compiler_params=_COMPILED,
        interpret=interpret,
        **launch,
    )
    found, *scales = kernel(*operands)
    found = found.reshape(written, -1)
    return (found, *scales) if scaled else found
