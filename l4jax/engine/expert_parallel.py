"""Expert parallelism: each device runs its own routed experts, for the tokens of all devices.

Devices that hold the same tokens need no exchange: each runs its experts on the tokens that it
sees, and one sum joins the results. Over data shards tokens travel to their expert and back:

- few tokens (a decode step): every device gathers the tokens of all shards, and the sum scatters
  the results;
- many tokens (a prefill): each device sends its tokens to the devices of their experts, at most
  `capacity` to one device in a round. Tokens beyond it travel in the next round; the rounds end
  when every token has been computed, whatever the routing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from l4jax import axes
from l4jax.kernels import Kernels
from l4jax.kernels.formats import Weight
from l4jax.kernels.reference import Norm
from sharding import Layout

GATHERED_TOKENS = 256  # of all data shards: beyond, tokens travel to their experts alone
_CAPACITY_FACTOR = 2  # a round's capacity, in units of an even routing's tokens
_LEAST_CAPACITY = 8

_lax: Any = lax  # the types of collectives are partially unknown


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """The mixture of experts on one device's shards, inside `Layout.local`.

    Attributes:
        kernels: for one device.
        layout: its strategy cuts the experts.
    """

    kernels: Kernels
    layout: Layout

    def mix_experts(
        self,
        x_TD: Array,
        norm: Norm | None,
        expert_T: Array,
        gate_T: Array,
        gate_up_EcFD: Weight,
        down_EDF: Weight,
        *shared: Weight,
    ) -> Array:
        """Compute `reference.mix_experts` for a device's tokens, summed over all devices.

        Args:
            x_TD, norm, expert_T, gate_T: the data shard's tokens.
            gate_up_EcFD, down_EDF: the device's own experts.
            shared: the device's part of the shared expert's matrices.
        """
        sums = tuple(dict.fromkeys((*self.layout.find(axes.HIDDEN), *self._lanes)))
        experts, weights = gate_up_EcFD.shape[0], (gate_up_EcFD, down_EDF)
        if not self._exchanged:
            own_T = _localize(expert_T, self.layout.find_index(axes.EXPERTS), experts)
            y_TD = self.kernels.mix_experts(
                x_TD, norm, own_T, gate_T, *weights, *shared, is_partial=True
            )
            return _lax.psum(y_TD, sums)
        x_TD = self.kernels.normalize(x_TD, norm)
        stacked = jax.tree.map(lambda w: w[None], shared)
        shared_TD = self.kernels.run_experts(x_TD, None, jnp.zeros_like(expert_T), *stacked)
        scaled_TD = x_TD * gate_T[:, None].astype(x_TD.dtype)
        few = len(x_TD) * self.layout.count(axes.TOKENS) <= GATHERED_TOKENS
        run = self._gather_tokens if few else self._send_tokens
        y_TD = shared_TD + run(scaled_TD, expert_T, *weights)
        return _lax.psum(y_TD, sums) if sums else y_TD

    @property
    def _exchanged(self) -> tuple[str, ...]:
        """The mesh axes that cut both experts and tokens."""
        tokens = self.layout.find(axes.TOKENS)
        return tuple(axis for axis in self.layout.find(axes.EXPERTS) if axis in tokens)

    @property
    def _lanes(self) -> tuple[str, ...]:
        """The mesh axes that cut experts, and whose devices hold the same tokens."""
        return tuple(x for x in self.layout.find(axes.EXPERTS) if x not in self._exchanged)

    def _gather_tokens(
        self, x_TD: Array, expert_T: Array, gate_up_EcFD: Weight, down_EDF: Weight
    ) -> Array:
        """Run the experts of this device on the tokens of all data shards.

        Returns:
            [T, D]: the sum over data shards, of this shard's tokens; a partial sum over the lanes.
        """
        x_UD, expert_U = (
            _lax.all_gather(each, self._exchanged, tiled=True) for each in (x_TD, expert_T)
        )
        own_U = _localize(expert_U, self.layout.find_index(axes.EXPERTS), gate_up_EcFD.shape[0])
        y_UD = self.kernels.run_experts(x_UD, None, own_U, gate_up_EcFD, down_EDF, is_partial=True)
        return _lax.psum_scatter(y_UD, self._exchanged, tiled=True)

    def _send_tokens(
        self, x_TD: Array, expert_T: Array, gate_up_EcFD: Weight, down_EDF: Weight
    ) -> Array:
        """Send this lane's share of the tokens to their experts and back, in rounds.

        Returns:
            [T, D]: zeros for the tokens of other lanes.
        """
        places, experts = self.layout.find(axes.EXPERTS), gate_up_EcFD.shape[0]
        devices = self.layout.count(axes.EXPERTS)
        lanes, tokens = devices // self.layout.count(axes.TOKENS), len(x_TD)
        share = -(-tokens // lanes)
        first = share * _lax.axis_index(self._lanes) if lanes > 1 else 0
        at_U = first + jnp.arange(share)
        is_real_U = at_U < tokens
        at_U = jnp.minimum(at_U, tokens - 1)
        x_UD, expert_U = x_TD[at_U], expert_T[at_U]
        device_U = jnp.where(is_real_U, expert_U // experts, devices)
        is_to_UP = device_U[:, None] == jnp.arange(devices)
        rank_UP = jnp.cumsum(is_to_UP, axis=0, dtype=jnp.int32) - 1
        rank_U = jnp.where(is_to_UP, rank_UP, 0).sum(axis=1)  # among the tokens to one device
        even = -(-share // devices)
        capacity = min(share, max(_LEAST_CAPACITY, _CAPACITY_FACTOR * even))
        largest = _lax.pmax(is_to_UP.sum(axis=0, dtype=jnp.int32).max(), places)
        slots = devices * capacity

        def exchange(sent: Array) -> Array:
            return _lax.all_to_all(sent, places, split_axis=0, concat_axis=0, tiled=True)

        def run_round(at: Array, y_UD: Array) -> Array:
            is_now_U = is_real_U & (rank_U // capacity == at)
            slot_U = jnp.where(is_now_U, device_U * capacity + rank_U % capacity, slots)
            sent_SD = jnp.zeros((slots, x_TD.shape[1]), x_TD.dtype)
            sent_SD = sent_SD.at[slot_U].set(x_UD, mode="drop")
            own_S = jnp.full(slots, experts, jnp.int32)  # an empty slot has no expert
            own_S = own_S.at[slot_U].set(expert_U % experts, mode="drop")
            y_SD = self.kernels.run_experts(
                exchange(sent_SD), None, exchange(own_S), gate_up_EcFD, down_EDF, is_partial=True
            )
            back_SD = exchange(y_SD)
            return jnp.where(is_now_U[:, None], back_SD[jnp.minimum(slot_U, slots - 1)], y_UD)

        rounds = -(-largest // capacity)
        y_UD = lax.fori_loop(0, rounds, run_round, jnp.zeros_like(x_UD))
        at_U = jnp.where(is_real_U, at_U, tokens)
        return jnp.zeros_like(x_TD).at[at_U].set(y_UD, mode="drop")


def _localize(expert_T: Array, device: Any, experts: int) -> Array:
    """Count experts from the device's first one; `experts` for experts of other devices."""
    own_T = expert_T - device * experts
    return jnp.where((own_T >= 0) & (own_T < experts), own_T, experts)
