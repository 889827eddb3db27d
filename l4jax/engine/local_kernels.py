"""Kernel selection, and entry through `shard_map`: each device on its own heads, rows and pages."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from l4jax import axes, cache
from l4jax.kernels import PORTABLE, Kernels
from l4jax.kernels.formats import name_axes
from l4jax.kernels.reference import HeadTransform, Norm

# Logical axes of an einsum's letters; among contracted letters, the first may be sharded.
_AXES = {
    **{"T": axes.TOKENS, "R": axes.ROWS, "D": axes.WIDTH, "V": axes.VOCAB},
    **{"F": axes.HIDDEN, "c": axes.GATE_UP},
    **{"K": axes.KV_HEADS, "J": axes.QUERIES_KV, "G": axes.QUERIES, "H": axes.HEAD_DIM},
}


def resolve_kernels(name: str, device: Any) -> str:
    """Resolve "auto" to "hopper" where the device runs it, else to "portable".

    Raises:
        ValueError: the name is unknown, or the device does not run the Hopper kernels.
    """
    if name not in ("auto", "portable", "hopper"):
        raise ValueError(f"kernels is {name!r}: it is 'portable', 'hopper' or 'auto'.")
    is_hopper = getattr(device, "compute_capability", None) == "9.0"
    # jax 0.10 lacks what the kernels use. jax 0.12 does not lower the matmul of up to 8 fp8 tokens:
    # "GMEM transfer does not access a whole number of complete 32 byte sectors".
    can_run = is_hopper and jax.__version_info__[:2] == (0, 11)
    if name == "hopper" and not can_run:
        raise ValueError(
            f"kernels is 'hopper', and here is {device.device_kind} with jax {jax.__version__}: "
            "they run on an H100 or an H200 with jax 0.11; take 'portable' or 'auto'."
        )
    return "hopper" if can_run and name != "portable" else "portable"


def choose_kernels(name: str, device: Any) -> Kernels:
    """Return the bundle of a name that `resolve_kernels` returned."""
    if name == "portable":
        return PORTABLE
    from l4jax.kernels.hopper.dispatch import Hopper  # imported on GPUs only

    hopper = Hopper(device.core_count)
    return Kernels(
        normalize=hopper.normalize,
        attend=hopper.attend,
        route=hopper.route,
        run_experts=hopper.run_experts,
        mix_experts=hopper.mix_experts,
        multiply=hopper.multiply,
    )


def make_kernels(kernels: Kernels, local: Callable[..., Any]) -> Kernels:
    """Wrap each kernel in `shard_map`, so that it sees a device's own heads, rows and pages.

    They are jitted: each is traced once per shape and not once per layer.

    Args:
        kernels: bundle for one device.
        local: `sharding.Layout.local`, which makes such functions from logical axes.
    """
    table, at = (axes.ROWS, axes.TABLE), (axes.TOKENS,)
    pool, y = cache.POOL_AXES, (axes.TOKENS, axes.KV_HEADS, axes.QUERIES, axes.HEAD_DIM)
    qkv = (axes.KV_HEADS, axes.QUERIES_KV, axes.HEAD_DIM, axes.WIDTH)
    x, gate_up = (axes.TOKENS, axes.WIDTH), (axes.EXPERTS, axes.GATE_UP, axes.HIDDEN, axes.WIDTH)
    down = (axes.EXPERTS, axes.WIDTH, axes.HIDDEN)

    def name_normed(norm: Norm) -> tuple[Any, Any]:
        """Return the axes of tokens and of the norm applied to them."""
        return x, Norm(x[1:], norm.eps)

    def normalize(x_TD: Any, norm: Norm) -> jax.Array:
        return local(kernels.normalize, name_normed(norm), x)(x_TD, norm)

    def attend(
        x_TD: Any, norm: Norm, qkv_KJHD: Any, transform: HeadTransform, *pool_and_tables: Any
    ) -> tuple[Any, Any, Any]:
        transform_axes = HeadTransform(
            angle_TH=None if transform.angle_TH is None else (axes.TOKENS, axes.HEAD_DIM),
            eps=transform.eps,
            factor_T=None if transform.factor_T is None else at,
            scales=None if transform.scales is None else ((), ()),
        )
        ins = (
            *name_normed(norm),
            name_axes(qkv_KJHD, qkv),
            transform_axes,
            pool,
            pool,
            table,
            at,
            at,
        )
        run = local(kernels.attend, ins, (y, pool, pool))
        return run(x_TD, norm, qkv_KJHD, transform, *pool_and_tables)

    def route(x_TD: Any, norm: Norm, router_ED: Any) -> tuple[Any, Any, Any]:
        ins = (*name_normed(norm), name_axes(router_ED, (axes.EXPERTS, axes.WIDTH)))
        outs = ((axes.TOKENS, axes.EXPERTS), at, at)
        return local(kernels.route, ins, outs)(x_TD, norm, router_ED)

    def run_experts(
        x_TD: Any, norm: Norm, expert_T: Any, gate_up_EcFD: Any, down_EDF: Any
    ) -> jax.Array:
        ins = (*name_normed(norm), at, name_axes(gate_up_EcFD, gate_up), name_axes(down_EDF, down))
        run = local(kernels.run_experts, ins, x, sum_over=axes.HIDDEN)
        return run(x_TD, norm, expert_T, gate_up_EcFD, down_EDF)

    def mix_experts(x_TD: Any, norm: Norm, expert_T: Any, gate_T: Any, *weights: Any) -> jax.Array:
        names = (gate_up, down, gate_up[1:], down[1:])
        ins = (
            *name_normed(norm),
            at,
            at,
            *(name_axes(w, n) for w, n in zip(weights, names, strict=True)),
        )
        run = local(kernels.mix_experts, ins, x, sum_over=axes.HIDDEN)
        return run(x_TD, norm, expert_T, gate_T, *weights)

    def multiply(subscripts: str, x: Any, weight: Any) -> jax.Array:
        ins, out = subscripts.split("->")
        x_axes, w_axes, out_axes = (
            tuple(_AXES[letter] for letter in letters) for letters in (*ins.split(","), out)
        )
        summed = next(axis for axis in w_axes if axis not in out_axes)
        run = functools.partial(kernels.multiply, subscripts)
        ins = (x_axes, name_axes(weight, w_axes))
        return local(run, ins, out_axes, sum_over=summed)(x, weight)

    return Kernels(
        normalize=jax.jit(normalize),
        attend=jax.jit(attend),
        route=jax.jit(route),
        run_experts=jax.jit(run_experts),
        mix_experts=jax.jit(mix_experts),
        multiply=jax.jit(multiply, static_argnums=0),
    )
