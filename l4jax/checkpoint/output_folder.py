"""The output folder of a conversion: checked before, written aside, and renamed when complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from l4jax.checkpoint import orbax
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.hf_config import load_config
from l4jax.checkpoint.names import detect_quantization
from l4jax.checkpoint.parameters import make_recipes
from l4jax.checkpoint.recipe import Recipe
from l4jax.checkpoint.safetensors import Index

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json")


def open_unquantized(
    source: Path, folder: Path, *, overwrite: bool, reason: str = ""
) -> tuple[Index, dict[str, Recipe], dict[str, tuple[str, ...]]]:
    """Open a checkpoint that is to be converted into `folder`.

    Args:
        source: a folder with safetensors under the published names.
        folder: to be made; one that is not empty is refused.
        overwrite: whether `folder` may be replaced.
        reason: why a quantized source is refused, appended to that error.

    Returns:
        The tensors; path -> recipe; path -> logical names of axes.

    Raises:
        CheckpointError: the source is converted or quantized already, or `folder` would lose files.
    """
    _check_folders(source, folder, overwrite=overwrite)
    index = Index.open(source)
    found, names = make_recipes(index, load_config(source))
    recipes = {path: recipe for path, recipe in found.items() if isinstance(recipe, Recipe)}
    if len(recipes) < len(found):
        raise CheckpointError(
            f"{source} is quantized already ({detect_quantization(index.specs)}){reason}: "
            "give it to --model as it is, or convert the BF16 checkpoint."
        )
    return index, recipes, names


@contextlib.contextmanager
def write_atomically(source: Path, folder: Path, total: int) -> Iterator[Path]:
    """Give a scratch folder for weights, which replaces `folder` at the end.

    At the end the scratch folder gets the other files of `source`, and is renamed. After an error
    it is removed, and `folder` is as before.

    Args:
        source: the checkpoint.
        folder: to be made.
        total: the bytes that will be written; refused if the disk has less space.
    """
    folder = folder.resolve()  # a symbolic link stays, and the space of its target's disk counts
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and {total / 1e9:.1f} are needed."
        )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
    try:
        unfinished.mkdir()
        yield unfinished
        _copy_files(source, unfinished)
        _replace_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_folders(source: Path, folder: Path, *, overwrite: bool) -> None:
    """Refuse a source that is converted already, and a folder that would lose files."""
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
    if source.resolve() in folder.resolve().parents:
        raise CheckpointError(
            f"{folder} is inside the checkpoint {source}, which would not load any more: "
            "choose a folder outside."
        )
    if os.path.ismount(folder):
        raise CheckpointError(
            f"{folder} is a mount point, which cannot be replaced: give a new folder inside it."
        )


def _copy_files(source: Path, folder: Path) -> None:
    """Copy all files but weights and existing ones, config.json last: no model loads without it."""
    files = [path for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
    for path in sorted(files, key=lambda path: (path.name == "config.json", path.name)):
        if not path.name.endswith(_WEIGHTS) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _replace_folder(unfinished: Path, folder: Path) -> None:
    """Rename the new folder; an old one is renamed first and removed last."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(replaced)
    os.rename(unfinished, folder)
    shutil.rmtree(replaced, ignore_errors=True)
