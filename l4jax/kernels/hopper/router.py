"""Router of a decode step in one launch: scores, the best expert and its gate.

A thread block takes a token; each of its warpgroups scores some experts, with the weights of the
next ones in flight:

    warpgroup 0  load x, w0..w3 | x.w0, load w4 | x.w1 ... | arrive, wait | argmax, gate, store
    warpgroup 1  load x, w4..w7 | ...                      | arrive, wait |

Partial sums go through shared memory: (experts + warpgroups) x 4 warps x 4 bytes, 320 bytes for 16
experts and 4 warpgroups. The norm divides the scores instead of the token.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from l4jax.kernels.hopper.elementwise import COMPILER_PARAMS, load_lines
from l4jax.kernels.hopper.heuristics import ROUTER_PREFETCH, ROUTER_WARPGROUPS
from l4jax.kernels.hopper.mosaic import WARPS
from l4jax.kernels.reference import Norm


@functools.partial(jax.jit, static_argnames="interpret")
def route_tokens(
    x_TU: Array, norm: Norm | None, router_EU: Array, *, interpret: Any = None
) -> tuple[Array, Array, Array]:
    """Compute `reference.route` of bfloat16 tokens."""
    (tokens, width), experts = x_TU.shape, router_EU.shape[0]
    warpgroups = math.gcd(experts, ROUTER_WARPGROUPS)

    def router_kernel(x: Any, router: Any, *flat: Any, partial_smem: Any, ready: Any) -> None:
        *norms, score, expert, gate = flat
        token, share = lax.axis_index("row"), lax.axis_index("share")
        own = [share * (experts // warpgroups) + at for at in range(experts // warpgroups)]
        x_WL, norm_weights = load_lines(x.at[token]), [load_lines(weight) for weight in norms]
        weights = [load_lines(router.at[at]) for at in own[:ROUTER_PREFETCH]]
        partial_smem[experts + share] = jnp.sum(x_WL * x_WL, axis=1)
        for weight in norm_weights:
            x_WL *= weight
        for at, e in enumerate(own):
            partial_smem[e] = jnp.sum(x_WL * weights[at], axis=1)
            weights += [load_lines(router.at[e]) for e in own[at + ROUTER_PREFETCH :][:1]]
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)

        def reduce_warps(at: int) -> Any:
            one, two, three, four = (partial_smem[at, warp] for warp in range(WARPS))
            return (one + two) + (three + four)

        @pl.when(share == 0)
        def _choose() -> None:
            factor = 1.0
            if norm is not None:
                factor = lax.rsqrt(reduce_warps(experts) * (1 / width) + norm.eps)
            best, best_score = jnp.int32(0), jnp.float32(-jnp.inf)
            for e in range(experts):
                # Round before the comparison, as the definition does.
                total = (reduce_warps(e) * factor).astype(jnp.bfloat16)
                score[token, e] = total
                total = total.astype(jnp.float32)
                best = jnp.where(total > best_score, e, best)
                best_score = jnp.maximum(best_score, total)
            expert[token] = best
            gate[token] = 1 / (1 + jnp.exp(-best_score))

    tiling = WARPS, width // WARPS
    kernel = plgpu.kernel(
        router_kernel,
        out_type=[
            jax.ShapeDtypeStruct((tokens, experts), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        ],
        grid=(tokens,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="share",
        scratch_types=dict(
            partial_smem=plgpu.SMEM((experts + warpgroups, WARPS), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=warpgroups),
        ),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )
    norms = [] if norm is None else [norm.scale_D.reshape(tiling)]
    operands = x_TU.reshape(tokens, *tiling), router_EU.reshape(experts, *tiling), *norms
    return tuple(kernel(*operands))
