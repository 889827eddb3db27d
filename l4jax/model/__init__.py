"""Llama 4, to be read top to bottom: transformer, attention, rope, moe, layers; and vision beside
them.
"""

from l4jax.model.transformer import Llama4, Parameters, declare_parameters
from l4jax.model.vision import VisionTower

__all__ = ["Llama4", "Parameters", "VisionTower", "declare_parameters"]
