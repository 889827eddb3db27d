"""Conversion of a published checkpoint to Orbax, with the model's other files."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from l4jax.checkpoint import orbax
from l4jax.checkpoint.output_folder import open_unquantized, write_atomically
from l4jax.checkpoint.parameters import THREADS, load_parameter, make_progress_bar
from l4jax.checkpoint.recipe import Recipe
from l4jax.checkpoint.safetensors import choose_dtype


def convert_folder(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write a model as an Orbax checkpoint, with its config and tokenizer.

    Host memory holds the largest parameter about three times: as read, transposed, and being
    written (8 GB for Scout, 64 GB for Maverick, in bfloat16). An interrupted conversion leaves
    `folder` as before.

    Args:
        source: a folder with safetensors under the published names.
        folder: to be made; one that is not empty is refused.
        dtype: of the parameters; that of the checkpoint if None.
        overwrite: replace `folder`, once all is written.
        progress: whether to show a bar on standard error.

    Returns:
        The bytes of the parameters.

    Raises:
        CheckpointError: no checkpoint, or quantized; `folder` is not empty; the disk is full.
    """
    source, folder = Path(source), Path(folder).absolute()
    index, recipes, names = open_unquantized(
        source, folder, overwrite=overwrite, reason=", which Orbax's layout does not hold"
    )
    dtype = np.dtype(jax.numpy.dtype(dtype or choose_dtype(index)))
    sizes = {path: _count_values(recipe) * dtype.itemsize for path, recipe in recipes.items()}
    total = sum(sizes.values())
    cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with (
        make_progress_bar(total, "converting", progress) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):

        def defer(path: str, recipe: Recipe) -> orbax.Deferred:
            def read() -> np.ndarray:
                values = np.asarray(
                    load_parameter(index, recipe, names[path], dtype, lambda _: cpu, pool)
                )
                bar.update(sizes[path])
                return values

            return orbax.Deferred(recipe.parameter_shape, dtype, read)

        with write_atomically(source, folder, total) as unfinished:
            orbax.save(
                unfinished, {path: defer(path, recipe) for path, recipe in recipes.items()}, names
            )
    return total


def _count_values(recipe: Recipe) -> int:
    return int(np.prod(recipe.shape, dtype=np.int64))
