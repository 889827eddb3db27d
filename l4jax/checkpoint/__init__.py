"""Checkpoints: where one is, what it is in, and its parameters on devices.

`safetensors` reads the format; `names` says which stored tensors make up a parameter, `rules` how;
`recipe` and `parameters` put them on devices. `orbax` is our own layout, which `conversion` writes.
"""

from pathlib import Path
from typing import Any

from l4jax.checkpoint import safetensors
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.hub import find_folder
from l4jax.checkpoint.parameters import Place, load_parameters
from l4jax.config import Config
from l4jax.model import Parameters

__all__ = ["CheckpointError", "Place", "find_dtype", "find_folder", "load"]


def load(
    folder: str | Path, config: Config, dtype: Any, place: Place, *, progress: bool = True
) -> Parameters:
    """Load the parameters of a model: safetensors under the published names, or a converted folder.

    Args:
        folder: that holds the checkpoint.
        config: of the model.
        dtype: of the parameters; what is stored in another is converted.
        place: the sharding of an array whose axes have these logical names, in any order of axes.
        progress: whether to show a bar on standard error.

    Returns:
        The tree of `l4jax.model.declare_parameters`, of arrays: its own slices on each device.

    Raises:
        CheckpointError: in one sentence, for what is missing, damaged, or not this model.
    """
    if _is_orbax(folder):
        from l4jax.checkpoint import orbax  # slow to import, and seldom needed

        return orbax.load(folder, config, dtype, place, progress=progress)
    return load_parameters(folder, config, dtype, place, progress=progress)


def find_dtype(folder: str | Path) -> str:
    """What to compute a checkpoint in, "bfloat16" or "float32": as its weights are stored."""
    if _is_orbax(folder):
        from l4jax.checkpoint import orbax

        return orbax.find_dtype(folder)
    return safetensors.find_dtype(safetensors.Index.open(folder))


def _is_orbax(folder: str | Path) -> bool:
    return (Path(folder) / "orbax").is_dir()
