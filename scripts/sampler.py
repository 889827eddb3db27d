"""Print what the sampler costs per step, with the noise of 64 bits and with that of 23.

    python -m scripts.sampler [--batch 1 8 32 128] [--steps 200]

A loop on the device samples from random logits. `greedy` is the loop without noise; the 23 bits are
those of `jax.random.gumbel`, which sample tokens with probabilities below 1.2e-7 too seldom.
"""

import argparse
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from l4jax import decode, sampling
from l4jax.sampling import SamplingMetadata, sample

VOCAB = 202_048  # of Scout and Maverick
ROUNDS = 5  # timed calls, of which the fastest counts
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "top_k, top_p": {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what the sampler costs per step.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=200, help="steps of a timed call")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{device}, vocabulary of {VOCAB}: µs per step, the fastest of {ROUNDS} calls")
    print(f"{'batch':>5}  {'parameters':14}{'64 bits':>10}{'23 bits':>10}{'ratio':>8}")
    for batch in args.batch:
        for name, settings in SETTINGS.items():
            new = measure(batch, args.steps, settings)
            with mock.patch.object(sampling, "_make_noise", make_short_noise):
                old = measure(batch, args.steps, settings)
            print(f"{batch:5}  {name:14}{new:10.1f}{old:10.1f}{new / old:8.2f}", flush=True)


def measure(batch: int, steps: int, settings: dict[str, float]) -> float:
    """Return µs per step of a loop that samples for a batch."""
    metadata = make_metadata(batch, settings)
    logits_RV = jax.random.normal(jax.random.key(0), (batch, VOCAB)) * 3
    run = decode.jit(make_loop(steps))  # with the engine's compiler options
    jax.block_until_ready(run(logits_RV, metadata))
    times: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run(logits_RV, metadata))
        times.append(time.perf_counter() - start)
    return min(times) / steps * 1e6


def make_metadata(batch: int, settings: dict[str, float]) -> SamplingMetadata:
    """Make the sampling parameters of a batch: one setting, and a seed for each row."""

    def fill(name: str, empty: float, dtype: type) -> np.ndarray:
        return np.full(batch, settings.get(name, empty), dtype)

    return SamplingMetadata(
        temperature_R=fill("temperature", 0, np.float32),
        top_k_R=fill("top_k", 0, np.int32),
        top_p_R=fill("top_p", 1, np.float32),
        min_p_R=fill("min_p", 0, np.float32),
        seed_R=np.arange(batch, dtype=np.uint32),
        seed_high_R=np.ones(batch, np.uint32),
    )


def make_loop(steps: int) -> Callable[[Array, SamplingMetadata], Array]:
    """Make a function that samples at consecutive positions; each step depends on the last one."""

    def run(logits_RV: Array, metadata: SamplingMetadata) -> Array:
        def advance(position: Array, token_R: Array) -> Array:
            # A tiny change by the last tokens: the compiler must not move work out of the loop.
            changed_RV = logits_RV + token_R.astype(jnp.float32)[:, None] * 1e-12
            position_R = jnp.full(token_R.shape, position)
            return sample(changed_RV, metadata, position_R, None).token_R

        return lax.fori_loop(0, steps, advance, jnp.zeros(len(logits_RV), jnp.int32))

    return run


def make_short_noise(metadata: SamplingMetadata, position_R: Array, vocab: int) -> Array:
    """Return Gumbel noise [R, V] of 23 bits: the noise of version 0.1.0."""

    def make_row(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    return jax.vmap(make_row)(metadata.seed_R, position_R)


if __name__ == "__main__":
    main()
