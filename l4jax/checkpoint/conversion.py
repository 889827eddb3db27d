"""From a published checkpoint to ours: Orbax beside the files that a model needs to talk."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from l4jax.checkpoint import orbax
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.hf_config import load_config
from l4jax.checkpoint.names import find_quantization
from l4jax.checkpoint.parameters import THREADS, find_recipes, load_parameter, make_bar
from l4jax.checkpoint.recipe import Recipe
from l4jax.checkpoint.safetensors import Index, find_dtype

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json")


def convert_folder(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write a model as an Orbax checkpoint in our layout, with its config and tokenizer beside it.

    Host memory holds the largest parameter about three times: as it was read, transposed, and on
    its way out (8 GB for Scout, 64 GB for Maverick, in bfloat16). A run that is cut off leaves
    `folder` as it was.

    Args:
        source: a folder with safetensors under the published names.
        folder: to be made; one that is not empty is refused.
        dtype: of the parameters; that of the checkpoint if None.
        overwrite: replace `folder`, once all is written.

    Returns:
        The bytes of the parameters.

    Raises:
        CheckpointError: no checkpoint, or quantized; `folder` is taken; the disk is full.
    """
    source, folder = Path(source), Path(folder).absolute()
    index, recipes, names = open_plain(
        source, folder, overwrite=overwrite, why=", which Orbax's layout does not hold"
    )
    kind = np.dtype(jax.numpy.dtype(dtype or find_dtype(index)))
    sizes = {path: _size(recipe) * kind.itemsize for path, recipe in recipes.items()}
    total = sum(sizes.values())
    cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with make_bar(total, "converting", progress) as bar, ThreadPoolExecutor(THREADS) as pool:

        def defer(path: str, recipe: Recipe) -> orbax.Deferred:
            def read() -> np.ndarray:
                values = np.asarray(
                    load_parameter(index, recipe, names[path], kind, lambda _: cpu, pool)
                )
                bar.update(sizes[path])
                return values

            return orbax.Deferred(recipe.parameter_shape, kind, read)

        with write_aside(source, folder, total) as unfinished:
            orbax.save(
                unfinished, {path: defer(path, recipe) for path, recipe in recipes.items()}, names
            )
    return total


def open_plain(
    source: Path, folder: Path, *, overwrite: bool, why: str = ""
) -> tuple[Index, dict[str, Recipe], dict[str, tuple[str, ...]]]:
    """A checkpoint to be converted into `folder`: its tensors, and as `find_recipes` gives them how
    they make the parameters, with the logical names of axes.

    Args:
        source, folder, overwrite: as `convert_folder` has them.
        why: what speaks against a quantized source, behind its being one.

    Raises:
        CheckpointError: for a source that is converted or quantized already, and a folder that
            would lose what it holds.
    """
    _check_folders(source, folder, overwrite=overwrite)
    index = Index.open(source)
    found, names = find_recipes(index, load_config(source))
    recipes = {path: recipe for path, recipe in found.items() if isinstance(recipe, Recipe)}
    if len(recipes) < len(found):
        raise CheckpointError(
            f"{source} is quantized already ({find_quantization(index.kinds)}){why}: "
            "give it to --model as it is, or convert the BF16 checkpoint."
        )
    return index, recipes, names


def _check_folders(source: Path, folder: Path, *, overwrite: bool) -> None:
    """Refuse a source that is converted already, and a folder that would lose what it holds."""
    if (source / orbax.FOLDER).is_dir():
        raise CheckpointError(
            f"{source} holds orbax/ already: convert the checkpoint that it was made from."
        )
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise CheckpointError(
            f"{folder} exists and is not empty: choose another folder, or --overwrite it."
        )
    if folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise CheckpointError(
            f"{folder} holds the checkpoint that is to be converted: choose another folder."
        )


@contextlib.contextmanager
def write_aside(source: Path, folder: Path, total: int) -> Iterator[Path]:
    """A new folder for weights: in the end it gets the other files of `source`, and takes the place
    of `folder`. Of one that was not finished nothing remains.

    Args:
        source: the checkpoint.
        folder: to be made.
        total: the bytes that will be written; refused where the disk has less.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and {total / 1e9:.1f} are needed."
        )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        unfinished.mkdir()
        yield unfinished
        _copy_files(source, unfinished)
        _put_in_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _size(recipe: Recipe) -> int:
    return int(np.prod(recipe.shape, dtype=np.int64))


def _copy_files(source: Path, folder: Path) -> None:
    """Copy all but weights and what is there, config.json last: without it nothing loads."""
    files = [path for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
    for path in sorted(files, key=lambda path: (path.name == "config.json", path.name)):
        if not path.name.endswith(_WEIGHTS) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename; what stood there before is set aside first, and removed last."""
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    os.rename(unfinished, folder)
    shutil.rmtree(aside, ignore_errors=True)
