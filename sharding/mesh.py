"""Meshes of devices, parsed from `8`, `2x4` or `data=2,seq=2,model=2`.

One number is the size of the `model` axis; two numbers are data x model; names are explicit.
Without an accelerator jax makes as many CPU devices as the mesh needs.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, SEQ, MODEL = "data", "seq", "model"
AXES = (DATA, SEQ, MODEL)  # outermost first; neighbors on the innermost are best connected
# The types of devices, make_mesh and config.update are partially unknown.
_jax: Any = jax
# Environment variables, read when jax starts: the older name and the newer; jaxlib refuses both.
_MEM_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_MEM_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", _MEM_FRACTION)


class MeshError(ValueError):
    """A mesh that cannot be made; one sentence says why, and which one can."""


def parse_mesh(text: str | int) -> dict[str, int]:
    """Parse the size of each axis of `AXES`, in that order.

    `"2x4"` is `{"data": 2, "seq": 1, "model": 4}`. Raises `MeshError` for any other syntax.
    """
    text = str(text).strip().lower()
    if re.fullmatch(r"\d+", text):
        sizes = {MODEL: int(text)}
    elif match := re.fullmatch(r"(\d+)x(\d+)", text):
        sizes = {DATA: int(match[1]), MODEL: int(match[2])}
    else:
        sizes = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if not match:
                raise MeshError(
                    f"--mesh {text}: write 8, 2x4 (data x model) or data=2,seq=2,model=2."
                )
            name, size = match[1], int(match[2])
            if name not in AXES:
                raise MeshError(
                    f"--mesh {text}: there is no axis {name!r}; the axes are {', '.join(AXES)}."
                )
            if name in sizes:
                raise MeshError(f"--mesh {text}: the axis {name!r} stands there twice.")
            sizes[name] = size
    if 0 in sizes.values():
        raise MeshError(f"--mesh {text}: an axis needs at least one device.")
    return {name: sizes.get(name, 1) for name in AXES}


def count_devices(sizes: Mapping[str, int]) -> int:
    """Count the devices of a mesh with these axis sizes."""
    return int(np.prod(list(sizes.values())))


def prepare_devices(text: str | int) -> str | None:
    """Provide enough devices for a mesh; without an accelerator, CPU devices.

    On a GPU, jax preallocates 97 % of the memory. Call it before anything else starts jax's
    backend, which fixes both.

    Returns:
        A line for the user if CPU devices were made, else None.

    Raises:
        MeshError: if there are too few devices.
    """
    sizes = parse_mesh(text)
    wanted = count_devices(sizes)
    if not _has_backend():
        # Collectives of CPU devices wait for each other inside one thread pool: with fewer threads
        # than devices they deadlock. XLA's default is one thread per core.
        threads = max(int(os.environ.get("NPROC", "0")), os.cpu_count() or 1, 2 * wanted)
        os.environ["NPROC"] = str(threads)
        # jax's default is 75 % of a GPU, which Scout's fp8 weights alone fill.
        if _read_mem_fraction() is None:
            os.environ[_MEM_FRACTION] = "0.97"
        # This applies to the CPU backend only.
        made = getattr(jax.config, "jax_num_cpu_devices", 1)
        _jax.config.update("jax_num_cpu_devices", max(made, wanted))
    found: list[Any] = _jax.devices()
    if len(found) < wanted:
        is_cpu = found[0].platform == "cpu"
        way_out = "CPU devices are made once: start Python again with the larger mesh"
        if not is_cpu:
            way_out = "JAX_PLATFORMS=cpu tries it on CPU devices"
        raise MeshError(
            f"--mesh {text}: it needs {wanted} devices and there are {len(found)} "
            f"({'CPU' if is_cpu else found[0].device_kind}); "
            f"give a mesh of at most {len(found)}. {way_out}."
        )
    if found[0].platform == "cpu" and wanted > 1:
        return f"No accelerator found: the mesh {describe(sizes)} is made of {wanted} CPU devices."
    return None


def find_gpu_share() -> float:
    """Return the share of a GPU's memory that jax preallocates."""
    return float(_read_mem_fraction() or "0.75")  # jax's default


def _read_mem_fraction() -> str | None:
    """Return the share that the environment sets, under either name; jaxlib ignores empty text."""
    return next((text for name in _MEM_FRACTIONS if (text := os.environ.get(name))), None)


def make_mesh(text: str | int) -> Mesh:
    """Make the mesh of the first devices, with automatic axes; call `prepare_devices` before."""
    sizes = parse_mesh(text)
    devices: list[Any] = _jax.devices()[: count_devices(sizes)]
    if len(devices) < count_devices(sizes):
        raise MeshError(f"--mesh {text}: there are only {len(devices)} devices.")
    return _jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def describe(sizes: Mapping[str, int]) -> str:
    """Format axis sizes as `data=2,model=4`; a sequence axis of one device is left out."""
    return ",".join(f"{name}={n}" for name, n in sizes.items() if n > 1 or name != SEQ)


def _has_backend() -> bool:
    from jax._src import xla_bridge  # no public function tells without starting the backend

    return xla_bridge.backends_are_initialized()
