"""Llama 4, to read top to bottom: transformer, attention, rope, moe, layers; and vision."""

from l4jax.model.transformer import Llama4, Parameters, declare_parameters
from l4jax.model.vision import VisionTower

__all__ = ["Llama4", "Parameters", "VisionTower", "declare_parameters"]
