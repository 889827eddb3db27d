"""Checkpoints: finding one, reading its config and its parameters, and writing one.

The path of a tensor: `safetensors` indexes the files; `names` and `layouts` make the `recipe` of
each parameter, `quantized_reader` that of a quantized one; `parameters` reads each device's slices,
and `online_quantization` quantizes them there. `orbax` is l4jax's own format; `orbax_writer` and
`compressed_tensors_writer` convert. `adapter` is a LoRA adapter, `peft` its files; `hf_config`
reads and writes `config.json`. README.md in this folder says more.
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
from l4jax.checkpoint.peft import check_copies, read_adapter, write_adapter
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
    "choose_dtype",
    "detect_quantization",
    "find_bundled",
    "find_folder",
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
    """Load the parameters of a model from safetensors under the published names, or from Orbax.

    Args:
        folder: of the checkpoint.
        config: of the model.
        dtype: of the parameters; values stored in another are converted.
        place: logical names of an array's axes, in any order -> its sharding.
        online_quantization: the format to quantize to while loading; None keeps the weights.
        lora: an adapter to merge, before weights are quantized.
        progress: whether to show a bar on standard error.

    Returns:
        The tree of `l4jax.model.declare_parameters` with arrays; each device has its own slices.
        A quantized parameter is a `Quantized` of two arrays.

    Raises:
        CheckpointError: in one sentence, a tensor is missing, damaged, or not of this model.
    """
    if lora is not None and lora.copies:
        check_copies(lora, None if _is_orbax(folder) else Index.open(folder))
    if _is_orbax(folder):
        from l4jax.checkpoint import orbax  # slow to import, and seldom needed

        read = orbax.load
    else:
        read = load_parameters
    params = read(
        folder,
        config,
        dtype,
        place,
        online_quantization=online_quantization,
        lora=lora,
        progress=progress,
    )
    parameters.check_finite(params, folder)
    return params


def load_kv_scales(folder: str | Path, config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    """Load the scales of keys and values in an fp8 cache, per layer; None if there are none."""
    return None if _is_orbax(folder) else parameters.load_kv_scales(folder, config)


def choose_dtype(folder: str | Path) -> str:
    """Choose the dtype to compute in from the stored weights: "bfloat16" or "float32"."""
    if _is_orbax(folder):
        from l4jax.checkpoint import orbax

        return orbax.choose_dtype(folder)
    return safetensors.choose_dtype(safetensors.Index.open(folder))


def detect_quantization(folder: str | Path) -> str | None:
    """Detect the format of a quantized checkpoint from its tensors; None for an unquantized one."""
    return None if _is_orbax(folder) else names.detect_quantization(Index.open(folder).specs)


def _is_orbax(folder: str | Path) -> bool:
    return (Path(folder) / "orbax").is_dir()
