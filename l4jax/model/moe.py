"""Mixture of experts: one routed expert per token, and a shared expert."""

from flax import linen as nn
from jax import Array

from l4jax import axes
from l4jax.config import TextConfig
from l4jax.kernels import Kernels
from l4jax.kernels.reference import Norm
from l4jax.model.layers import GatedMLP, declare


class MixtureOfExperts(nn.Module):
    """`shared(x) + expert_e(g * x)` with e the best-scored expert and g = sigmoid(score).

    The gate scales the expert's input, not its output (scaling the output is 95 % off), and gates
    are not normalized over experts.
    """

    config: TextConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x_TD: Array, norm: Norm | None) -> Array:
        c = self.config
        router_ED = declare(self, "router", (c.experts, c.width), (axes.SCORES, axes.WIDTH))
        gate_up_EcFD = declare(
            self,
            "gate_up",
            (c.experts, 2, c.expert_width, c.width),
            (axes.EXPERTS, axes.GATE_UP, axes.EXPERT_HIDDEN, axes.WIDTH),
        )
        down_EDF = declare(
            self,
            "down",
            (c.experts, c.width, c.expert_width),
            (axes.EXPERTS, axes.WIDTH, axes.EXPERT_HIDDEN),
        )
        shared = GatedMLP(c.width, c.expert_width, self.kernels, name="shared")
        score_TE, expert_T, gate_T = self.kernels.route(x_TD, norm, router_ED)
        self.sow("intermediates", "score_TE", score_TE)  # read by training
        weights = (gate_up_EcFD, down_EDF, shared.gate_up_cFD, shared.down_DF)
        return self.kernels.mix_experts(x_TD, norm, expert_T, gate_T, *weights)
