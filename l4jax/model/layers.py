"""Layers that the other modules use: weight declaration, projection, norms, the gated MLP."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import RulesFallback, with_logical_constraint
from jax import Array

from l4jax import axes
from l4jax.kernels import Kernels
from l4jax.kernels.formats import Weight, multiply
from l4jax.kernels.reference import Norm


def declare(module: nn.Module, name: str, shape: tuple[int, ...], names: tuple[str, ...]) -> Array:
    """Declare a weight of a module, with the logical name of each of its axes."""
    if not module.is_initializing():  # skip Flax's shape check against a traced initializer
        return nn.unbox(module.get_variable("params", name))
    initialize = nn.with_logical_partitioning(nn.initializers.normal(0.02), names)
    return module.param(name, initialize, shape)  # type: ignore[return-value]


def project(subscripts: str, x: Array, weight: Weight) -> Array:
    """Multiply by a weight of any format: `einsum`, in the dtype of x.

    Weights end in the contracted axes.
    """
    return multiply(subscripts, x, weight)


def constrain(x: Array, *names: str) -> Array:
    """Name the axes of an array; an active sharding table places them."""
    return with_logical_constraint(x, names, fallback=RulesFallback.RAISE_ERROR)


class RMSNorm(nn.Module):
    """Parameters of an RMSNorm, which a kernel applies to the tokens that it reads."""

    width: int
    eps: float

    @nn.compact
    def __call__(self) -> Norm:
        return Norm(declare(self, "scale", (self.width,), (axes.WIDTH,)), self.eps)


class GatedMLP(nn.Module):
    """`down @ (silu(gate @ x) * (up @ x))`: dense layers, and the shared expert."""

    width: int
    hidden: int
    kernels: Kernels

    def setup(self) -> None:
        shape, names = (2, self.hidden, self.width), (axes.GATE_UP, axes.HIDDEN, axes.WIDTH)
        self.gate_up_cFD = declare(self, "gate_up", shape, names)
        self.down_DF = declare(self, "down", shape[:0:-1], names[:0:-1])

    def __call__(self, x_TD: Array, norm: Norm | None) -> Array:
        first_T = jnp.zeros(x_TD.shape[0], jnp.int32)  # the only expert
        weights = jax.tree.map(lambda w: w[None], (self.gate_up_cFD, self.down_DF))
        return self.kernels.run_experts(x_TD, norm, first_T, *weights)


class LayerNorm(nn.Module):
    """LayerNorm of the vision tower, with weight and bias, in float32; returns the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x_D: Array) -> Array:
        scale_D, bias_D = (
            declare(self, name, x_D.shape[-1:], (axes.VISION_WIDTH,)) for name in ("scale", "bias")
        )
        x32_D = x_D.astype(jnp.float32)
        centered_D = x32_D - x32_D.mean(axis=-1, keepdims=True)
        variance = jnp.mean(centered_D * centered_D, axis=-1, keepdims=True)
        normed_D = (centered_D * jax.lax.rsqrt(variance + self.eps)).astype(x_D.dtype)
        return normed_D * scale_D + bias_D
