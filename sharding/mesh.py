"""From `8`, `2x4` or `data=2,model=4` to a mesh of devices.

A number is that many devices on the `model` axis; two numbers are data x model; names say it
outright. Where there is no accelerator, CPU devices are made until there are enough: a mesh can be
tried anywhere.
"""

import os
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)  # from the outermost to the innermost, where neighbors are best connected
_GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # in the environment that jax starts with


class MeshError(ValueError):
    """A mesh that cannot be had, said in one sentence."""


def parse_mesh(text: str | int) -> dict[str, int]:
    """The size of each axis, all of `AXES`, in that order: `"2x4"` is `{"data": 2, "model": 4}`.

    Raises `MeshError` for what it cannot read.
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
                raise MeshError(f"--mesh {text}: write 8, 2x4 (data x model) or data=2,model=4.")
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
    """Devices that axes of these sizes span."""
    return int(np.prod(list(sizes.values())))


def prepare_devices(text: str | int) -> str | None:
    """Have enough devices for a mesh, making CPU devices where there is no accelerator; of a GPU,
    nearly all of its memory.

    Call it before anything else asks jax for a device: the number is fixed from then on.

    Returns:
        A line for the user where CPU devices were made, else None.
    """
    sizes = parse_mesh(text)
    wanted = count_devices(sizes)
    if not _has_backend():
        # Collectives of made-up CPU devices wait for each other inside one thread pool: with fewer
        # threads than devices that is a deadlock. XLA takes the machine's size unless told.
        threads = max(int(os.environ.get("NPROC", "0")), os.cpu_count() or 1, 2 * wanted)
        os.environ["NPROC"] = str(threads)
        # Of a GPU jax takes three quarters unless told otherwise: Scout in fp8 is as much.
        os.environ.setdefault(_GPU_SHARE, "0.97")
        # This counts where the CPU is the backend; an accelerator's devices stay as they are.
        made = getattr(jax.config, "jax_num_cpu_devices", 1)
        jax.config.update("jax_num_cpu_devices", max(made, wanted))
    found = jax.devices()
    if len(found) < wanted:
        is_cpu = found[0].platform == "cpu"
        way_out = "CPU devices are made once: start Python anew with the larger mesh"
        if not is_cpu:
            way_out = "JAX_PLATFORMS=cpu tries it on made-up CPU devices"
        raise MeshError(
            f"--mesh {text}: it needs {wanted} devices and there are {len(found)} "
            f"({'CPU' if is_cpu else found[0].device_kind}); "
            f"give a mesh of at most {len(found)}. {way_out}."
        )
    if found[0].platform == "cpu" and wanted > 1:
        return f"No accelerator found: the mesh {describe(sizes)} is made of {wanted} CPU devices."
    return None


def find_gpu_share() -> float:
    """The share of a GPU's memory that jax takes: of `prepare_devices`, or whoever came first."""
    return float(os.environ.get(_GPU_SHARE, "0.75"))  # without a word, three quarters


def make_mesh(text: str | int) -> Mesh:
    """The mesh itself, of the first devices, with automatic axes. `prepare_devices` comes first."""
    sizes = parse_mesh(text)
    devices = jax.devices()[: count_devices(sizes)]
    if len(devices) < count_devices(sizes):
        raise MeshError(f"--mesh {text}: there are only {len(devices)} devices.")
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def describe(sizes: Mapping[str, int]) -> str:
    """`data=2,model=4`, the spelling that says it all."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _has_backend() -> bool:
    from jax._src import xla_bridge  # there is no public way to ask without starting it

    return xla_bridge.backends_are_initialized()
