"""Which kernels run, and each of them on a device's own heads, rows and pages."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from l4jax import axes, cache
from l4jax.kernels import PORTABLE, Kernels
from l4jax.kernels.formats import name_axes
from l4jax.kernels.reference import HeadTransform, Norm

# What the letters of a product stand for; of those that are summed, the first may be cut.
_AXES = {
    **{"T": axes.TOKENS, "R": axes.ROWS, "D": axes.WIDTH, "V": axes.VOCAB},
    **{"F": axes.HIDDEN, "c": axes.GATE_UP},
    **{"K": axes.KV_HEADS, "J": axes.QUERIES_KV, "G": axes.QUERIES, "H": axes.HEAD_DIM},
}


def name_kernels(name: str, device: Any) -> str:
    """Which kernels are meant: "portable" runs everywhere, "hopper" on Hopper GPUs, and "auto" is
    "hopper" where this device runs it.

    Raises:
        ValueError: for another name, and where the fast ones cannot run.
    """
    if name not in ("auto", "portable", "hopper"):
        raise ValueError(f"kernels is {name!r}: it is 'portable', 'hopper' or 'auto'.")
    is_hopper = getattr(device, "compute_capability", None) == "9.0"
    can_run = is_hopper and jax.__version_info__ >= (0, 11)
    if name == "hopper" and not can_run:
        raise ValueError(
            f"kernels is 'hopper', and here is {device.device_kind} with jax {jax.__version__}: "
            "they run on an H100 or an H200 with jax 0.11 or newer; take 'portable' or 'auto'."
        )
    return "hopper" if can_run and name != "portable" else "portable"


def choose_kernels(name: str, device: Any) -> Kernels:
    """The kernels of a name that `name_kernels` gave."""
    if name == "portable":
        return PORTABLE
    from l4jax.kernels.hopper import Hopper  # needs what only jax for a GPU brings

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
    """The kernels, each entered through `shard_map`: on a device's own heads, rows and pages.
    `local` is what a layout makes such functions with.

    They are jitted, so that each is traced once a shape and not once a layer.
    """
    table, at = (axes.ROWS, axes.TABLE), (axes.TOKENS,)
    pool, y = cache.POOL_AXES, (axes.TOKENS, axes.KV_HEADS, axes.QUERIES, axes.HEAD_DIM)
    qkv = (axes.KV_HEADS, axes.QUERIES_KV, axes.HEAD_DIM, axes.WIDTH)
    x, gate_up = (axes.TOKENS, axes.WIDTH), (axes.EXPERTS, axes.GATE_UP, axes.HIDDEN, axes.WIDTH)
    down = (axes.EXPERTS, axes.WIDTH, axes.HIDDEN)

    def read(norm: Norm) -> tuple[Any, Any]:
        """The names of the axes of what is read through a norm."""
        return x, Norm(x[1:], norm.eps)

    def normalize(x_TD: Any, norm: Norm) -> jax.Array:
        return local(kernels.normalize, read(norm), x)(x_TD, norm)

    def attend(
        x_TD: Any, norm: Norm, qkv_KJHD: Any, turn: HeadTransform, *pool_and_where: Any
    ) -> tuple[Any, Any, Any]:
        names = HeadTransform(
            angle_TH=None if turn.angle_TH is None else (axes.TOKENS, axes.HEAD_DIM),
            eps=turn.eps,
            factor_T=None if turn.factor_T is None else at,
            scales=None if turn.scales is None else ((), ()),
        )
        ins = (*read(norm), name_axes(qkv_KJHD, qkv), names, pool, pool, table, at, at)
        run = local(kernels.attend, ins, (y, pool, pool))
        return run(x_TD, norm, qkv_KJHD, turn, *pool_and_where)

    def route(x_TD: Any, norm: Norm, router_ED: Any) -> tuple[Any, Any, Any]:
        ins = (*read(norm), name_axes(router_ED, (axes.EXPERTS, axes.WIDTH)))
        outs = ((axes.TOKENS, axes.EXPERTS), at, at)
        return local(kernels.route, ins, outs)(x_TD, norm, router_ED)

    def run_experts(
        x_TD: Any, norm: Norm, expert_T: Any, gate_up_EcFD: Any, down_EDF: Any
    ) -> jax.Array:
        ins = (*read(norm), at, name_axes(gate_up_EcFD, gate_up), name_axes(down_EDF, down))
        run = local(kernels.run_experts, ins, x, sum_over=axes.HIDDEN)
        return run(x_TD, norm, expert_T, gate_up_EcFD, down_EDF)

    def mix_experts(x_TD: Any, norm: Norm, expert_T: Any, gate_T: Any, *weights: Any) -> jax.Array:
        names = (gate_up, down, gate_up[1:], down[1:])
        ins = (*read(norm), at, at, *(name_axes(w, n) for w, n in zip(weights, names, strict=True)))
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
