"""RoPE angles in float32; `kernels.reference.rotate` applies them."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from l4jax.config import RopeScaling


def scale_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Compute radians per position of each pair: [head_dim / 2] float32.

    llama3 scaling keeps wavelengths below `original / high_freq_factor`, divides the frequencies
    of wavelengths above `original / low_freq_factor` by `factor`, and blends between. Scout has
    both factors 1: no wavelength is between, and the blend would be 0 / 0.
    """
    frequency_H = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        rotations_H = scaling.original_max_positions * frequency_H / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        blend_H = (rotations_H - low) / (high - low) if high != low else rotations_H >= low
        kept_H = np.clip(blend_H, 0.0, 1.0)
        frequency_H = frequency_H * (kept_H + (1 - kept_H) / scaling.factor)
    return frequency_H.astype(np.float32)


def compute_angles(position_T: Array, frequency_H: np.ndarray) -> Array:
    """Compute float32 angles [T, H / 2] of positions [T]."""
    return position_T.astype(jnp.float32)[:, None] * frequency_H
