"""Where things live: meshes, tables of axes, placement. Knows jax, nothing of Llama."""

from sharding.layout import Layout
from sharding.mesh import MeshError, find_gpu_share, make_mesh, prepare_devices
from sharding.rules import STRATEGIES, TENSOR, Rules

__all__ = [
    "STRATEGIES",
    "TENSOR",
    "Layout",
    "MeshError",
    "Rules",
    "find_gpu_share",
    "make_mesh",
    "prepare_devices",
]
