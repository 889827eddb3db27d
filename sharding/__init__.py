"""Meshes, rule tables and the placement of arrays. Imports jax and numpy; knows no model."""

from sharding.layout import Layout
from sharding.mesh import (
    DATA,
    MODEL,
    SEQ,
    MeshError,
    find_gpu_share,
    make_mesh,
    parse_mesh,
    prepare_devices,
)
from sharding.rules import Rules

__all__ = [
    "DATA",
    "MODEL",
    "SEQ",
    "Layout",
    "MeshError",
    "Rules",
    "find_gpu_share",
    "make_mesh",
    "parse_mesh",
    "prepare_devices",
]
