"""Kernel selection, and entry through `shard_map`: each device on its own heads, rows and pages."""

import dataclasses
import functools
from typing import Any

import jax

from l4jax import axes, cache
from l4jax.engine.context_parallel import ContextParallel
from l4jax.engine.expert_parallel import ExpertParallel
from l4jax.kernels import PORTABLE, Kernels, portable
from l4jax.kernels.formats import name_axes
from l4jax.kernels.reference import HeadTransform, Norm
from sharding import Layout

# Logical axes of an einsum's letters; among contracted letters, the first may be sharded.
_AXES = {
    **{"T": axes.TOKENS, "R": axes.ROWS, "D": axes.WIDTH, "V": axes.VOCAB},
    **{"F": axes.HIDDEN, "c": axes.GATE_UP},
    **{"K": axes.KV_HEADS, "J": axes.QUERIES_KV, "G": axes.QUERIES, "H": axes.HEAD_DIM},
}
_TOKEN, _X = (axes.TOKENS,), (axes.TOKENS, axes.WIDTH)
_Y = (axes.TOKENS, axes.KV_HEADS, axes.QUERIES, axes.HEAD_DIM)
_QKV = (axes.KV_HEADS, axes.QUERIES_KV, axes.HEAD_DIM, axes.WIDTH)
_GATE_UP = (axes.EXPERTS, axes.GATE_UP, axes.EXPERT_HIDDEN, axes.WIDTH)
_DOWN = (axes.EXPERTS, axes.WIDTH, axes.EXPERT_HIDDEN)
_SHARED_GATE_UP = (axes.GATE_UP, axes.HIDDEN, axes.WIDTH)
_SHARED_DOWN = (axes.WIDTH, axes.HIDDEN)


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
        attend_part=portable.attend_part,
        route=hopper.route,
        run_experts=hopper.run_experts,
        mix_experts=hopper.mix_experts,
        multiply=hopper.multiply,
    )


def make_kernels(kernels: Kernels, layout: Layout) -> Kernels:
    """Wrap each kernel in `shard_map`, so that it sees a device's own heads, rows and pages.

    They are jitted: each is traced once per shape and not once per layer.

    Args:
        kernels: bundle for one device.
        layout: mesh and strategy.
    """
    local = _LocalKernels(kernels, layout)
    is_striped = bool(layout.find(axes.STRIPES))
    return Kernels(
        normalize=jax.jit(local.normalize),
        embed=jax.jit(local.embed),
        attend=jax.jit(local.attend),
        attend_global=jax.jit(local.attend_striped) if is_striped else None,
        route=jax.jit(local.route),
        run_experts=jax.jit(local.run_experts),
        mix_experts=jax.jit(local.mix_experts),
        multiply=jax.jit(local.multiply, static_argnums=0),
    )


@dataclasses.dataclass(frozen=True)
class _LocalKernels:
    """Kernels of whole arrays, each of which runs on the devices' own shards."""

    kernels: Kernels
    layout: Layout

    def normalize(self, x_TD: Any, norm: Norm) -> jax.Array:
        return self.layout.local(self.kernels.normalize, _name_normed(norm), _X)(x_TD, norm)

    def embed(self, token_T: Any, embedding_VD: Any) -> jax.Array:
        layout = self.layout

        # Each device looks up its own words. XLA would gather the whole table for one token.
        def look_up(token_T: Any, embedding_VD: Any) -> jax.Array:
            if not layout.find(axes.VOCAB):
                return self.kernels.embed(token_T, embedding_VD)
            first = layout.find_index(axes.VOCAB) * len(embedding_VD)
            return self.kernels.embed(token_T, embedding_VD, first)

        ins = (_TOKEN, (axes.VOCAB, axes.WIDTH))
        return layout.local(look_up, ins, _X, sum_over=axes.VOCAB)(token_T, embedding_VD)

    def attend(self, *arguments: Any) -> tuple[Any, Any, Any]:
        return self._attend(self.kernels.attend, *arguments)

    def attend_striped(self, *arguments: Any) -> tuple[Any, Any, Any]:
        return self._attend(ContextParallel(self.kernels, self.layout).attend, *arguments)

    def _attend(
        self,
        fn: Any,
        x_TD: Any,
        norm: Norm,
        qkv_KJHD: Any,
        transform: HeadTransform,
        *pool_and_tables: Any,
    ) -> tuple[Any, Any, Any]:
        transform_axes = HeadTransform(
            angle_TH=None if transform.angle_TH is None else (axes.TOKENS, axes.HEAD_DIM),
            eps=transform.eps,
            factor_T=None if transform.factor_T is None else _TOKEN,
            scales=None if transform.scales is None else ((), ()),
        )
        pool, table = cache.POOL_AXES, (axes.ROWS, axes.TABLE)
        qkv = name_axes(qkv_KJHD, _QKV)
        ins = (*_name_normed(norm), qkv, transform_axes, pool, pool, table, _TOKEN, _TOKEN)
        run = self.layout.local(fn, ins, (_Y, pool, pool))
        return run(x_TD, norm, qkv_KJHD, transform, *pool_and_tables)

    def route(self, x_TD: Any, norm: Norm, router_ED: Any) -> tuple[Any, Any, Any]:
        ins = (*_name_normed(norm), name_axes(router_ED, (axes.SCORES, axes.WIDTH)))
        outs = ((axes.TOKENS, axes.SCORES), _TOKEN, _TOKEN)
        return self.layout.local(self.kernels.route, ins, outs)(x_TD, norm, router_ED)

    def run_experts(
        self, x_TD: Any, norm: Norm, expert_T: Any, gate_up_EcFD: Any, down_EDF: Any
    ) -> jax.Array:
        """Run the one expert of a dense block."""
        ins = (
            *_name_normed(norm),
            _TOKEN,
            name_axes(gate_up_EcFD, (axes.SINGLE, *_SHARED_GATE_UP)),
            name_axes(down_EDF, (axes.SINGLE, *_SHARED_DOWN)),
        )
        run = self.layout.local(self.kernels.run_experts, ins, _X, sum_over=axes.HIDDEN)
        return run(x_TD, norm, expert_T, gate_up_EcFD, down_EDF)

    def mix_experts(
        self, x_TD: Any, norm: Norm, expert_T: Any, gate_T: Any, *weights: Any
    ) -> jax.Array:
        names = (_GATE_UP, _DOWN, _SHARED_GATE_UP, _SHARED_DOWN)
        named = (name_axes(w, n) for w, n in zip(weights, names, strict=True))
        ins = (*_name_normed(norm), _TOKEN, _TOKEN, *named)
        if self.layout.find(axes.EXPERTS):
            run = self.layout.local(ExpertParallel(self.kernels, self.layout).mix_experts, ins, _X)
        else:
            run = self.layout.local(self.kernels.mix_experts, ins, _X, sum_over=axes.HIDDEN)
        return run(x_TD, norm, expert_T, gate_T, *weights)

    def multiply(self, subscripts: str, x: Any, weight: Any) -> jax.Array:
        ins, out = subscripts.split("->")
        x_axes, w_axes, out_axes = (
            tuple(_AXES[letter] for letter in letters) for letters in (*ins.split(","), out)
        )
        summed = next(axis for axis in w_axes if axis not in out_axes)
        run = functools.partial(self.kernels.multiply, subscripts)
        ins = (x_axes, name_axes(weight, w_axes))
        return self.layout.local(run, ins, out_axes, sum_over=summed)(x, weight)


def _name_normed(norm: Norm) -> tuple[Any, Any]:
    """Return the axes of tokens and of the norm applied to them."""
    return _X, Norm(_X[1:], norm.eps)
