"""Meshes, rule tables and the placement of arrays. Imports jax and numpy; knows no model."""

from sharding.layout import Layout
from sharding.mesh import DATA, MODEL, MeshError, find_gpu_share, make_mesh, prepare_devices
from sharding.rules import Rules

__all__ = [
    "DATA",
    "MODEL",
    "Layout",
    "MeshError",
    "Rules",
    "find_gpu_share",
    "make_mesh",
    "prepare_devices",
]
