"""Where things live: meshes, tables of axes, placement. Knows jax, nothing of Llama."""

from sharding.layout import Layout
from sharding.mesh import MeshError, make_mesh, prepare_devices
from sharding.rules import STRATEGIES, TENSOR, Rules

__all__ = [
    "STRATEGIES",
    "TENSOR",
    "Layout",
    "MeshError",
    "Rules",
    "make_mesh",
    "prepare_devices",
]
