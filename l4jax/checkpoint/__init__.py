"""Checkpoints: where one is, what it is in, and its parameters on devices.

`safetensors` reads the format; `names` says which stored tensors make up a parameter, `rules` how;
`recipe` and `parameters` put them on devices, `narrow` in fewer bits. `orbax` is our own layout,
which `conversion` writes. `adapter` is what LoRA adds to them, and `peft` its files.
"""

from pathlib import Path
from typing import Any

import numpy as np

from l4jax.checkpoint import names, parameters, safetensors
from l4jax.checkpoint.adapter import Adapter
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.hf_config import format_config, load_config, parse_config
from l4jax.checkpoint.hub import BUNDLED, SAMPLE, find_bundled, find_folder
from l4jax.checkpoint.online_quantization import OnlineQuantization
from l4jax.checkpoint.parameters import Place, load_parameters
from l4jax.checkpoint.peft import read_adapter, write_adapter
from l4jax.checkpoint.safetensors import Index
from l4jax.config import Config
from l4jax.model import Parameters

__all__ = [
    "BUNDLED",
    "SAMPLE",
    "Adapter",
    "CheckpointError",
    "OnlineQuantization",
    "Place",
    "find_bundled",
    "find_dtype",
    "find_folder",
    "find_quantization",
    "format_config",
    "load",
    "load_config",
    "load_kv_scales",
    "parse_config",
    "read_adapter",
    "write_adapter",
]


def load(
    folder: str | Path,
    config: Config,
    dtype: Any,
    place: Place,
    *,
    online_quantization: OnlineQuantization | None = None,
    lora: Adapter | None = None,
    progress: bool = True,
) -> Parameters:
    """Load the parameters of a model: safetensors under the published names, or a converted folder.

    Args:
        folder: that holds the checkpoint.
        config: of the model.
        dtype: of the parameters; what is stored in another is converted.
        place: the sharding of an array whose axes have these logical names, in any order of axes.
        online_quantization: what to quantize on the way, and how; nothing if None.
        lora: an adapter to merge, before anything is quantized.
        progress: whether to show a bar on standard error.

    Returns:
        The tree of `l4jax.model.declare_parameters`, of arrays: its own slices on each device. What
        is quantized is a `Quantized` of two arrays.

    Raises:
        CheckpointError: in one sentence, for what is missing, damaged, or not this model.
    """
    if _is_orbax(folder):
        from l4jax.checkpoint import orbax  # slow to import, and seldom needed

        read = orbax.load
    else:
        read = load_parameters
    return read(
        folder,
        config,
        dtype,
        place,
        online_quantization=online_quantization,
        lora=lora,
        progress=progress,
    )


def load_kv_scales(folder: str | Path, config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    """What keys and values are divided by in an fp8 cache, per layer; None if nobody says."""
    return None if _is_orbax(folder) else parameters.load_kv_scales(folder, config)


def find_dtype(folder: str | Path) -> str:
    """What to compute a checkpoint in, "bfloat16" or "float32": as its weights are stored."""
    if _is_orbax(folder):
        from l4jax.checkpoint import orbax

        return orbax.find_dtype(folder)
    return safetensors.find_dtype(safetensors.Index.open(folder))


def find_quantization(folder: str | Path) -> str | None:
    """How a checkpoint is quantized, in words that its tensors tell; None for a plain one."""
    return None if _is_orbax(folder) else names.find_quantization(Index.open(folder).kinds)


def _is_orbax(folder: str | Path) -> bool:
    return (Path(folder) / "orbax").is_dir()
