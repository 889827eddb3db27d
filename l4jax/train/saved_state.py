"""Save and restore the training state, in 5 bytes per weight and exactly resumable.

By default the saved state is rounded: weights and second moments to bfloat16, first moments to e4m3
with one scale per row. Training continues from the rounded state, whether the process ends or not.
A run that is killed and resumed therefore equals an uninterrupted run, bit for bit.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from l4jax.checkpoint.safetensors import INDEX, Index, write_safetensors
from l4jax.kernels.formats import Quantized, dequantize, quantize_fp8
from l4jax.train.train_step import TrainState

SHARD_BYTES = 15 * 2**20  # limit per file, without the header
_UNFINISHED = ".unfinished"  # folder of a state that is being written

Place = Callable[[tuple[str, ...]], Sharding]
StateEncoding = Callable[[TrainState], TrainState]


class StateError(ValueError):
    """A saved state that this run cannot resume from."""


@jax.jit
def quantize_state(state: TrainState) -> TrainState:
    """Round a state to its saved form: bfloat16, and e4m3 for first moments of matrices."""

    def round_leaf(path: Any, leaf: jax.Array) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        is_first_moment = ".mu" in jax.tree_util.keystr(path)
        if is_first_moment and leaf.ndim > 1:
            return quantize_fp8(leaf, 1)
        return leaf.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(round_leaf, state)


def keep_exact(state: TrainState) -> TrainState:
    """Return the state unchanged, in place of `quantize_state`: 12 bytes per weight."""
    return state


@jax.jit
def dequantize_state(saved: TrainState) -> TrainState:
    """Convert a saved state back to float32.

    A program of its own: fused with `quantize_state`, XLA might omit the rounding.
    """

    def restore_leaf(leaf: Any) -> jax.Array:
        if isinstance(leaf, Quantized):
            return dequantize(leaf, jnp.float32)
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float32) if is_float else leaf

    return jax.tree.map(restore_leaf, saved, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def save(
    folder: Path,
    state: TrainState,
    settings: Mapping[str, Any],
    encode: StateEncoding = quantize_state,
) -> TrainState:
    """Write `folder/step-N` atomically, and remove older states.

    Args:
        folder: the run's folder.
        state: the state at step N.
        settings: the run's configuration as JSON values; `restore` compares it.
        encode: converts the state to its saved form.

    Returns:
        The state as saved, in float32; training continues from it.
    """
    saved = encode(state)
    step = int(saved.step)
    target, unfinished = folder / f"step-{step:08}", folder / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed run
    unfinished.mkdir(parents=True)
    arrays = {name: np.asarray(leaf) for name, leaf in _flatten(saved).items()}
    shards = _split_into_shards(arrays)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"state-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(unfinished / name, {key: arrays[key] for key in shard})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"step": step, "plan": settings}, "weight_map": weight_map}
    (unfinished / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.replace(target)
    for older in list_saved(folder)[:-1]:
        shutil.rmtree(older)
    return dequantize_state(saved)


def list_saved(folder: Path) -> list[Path]:
    """List the saved states of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def restore(
    folder: Path,
    abstract: TrainState,
    names: TrainState,
    place: Place,
    settings: Mapping[str, Any],
    encode: StateEncoding = quantize_state,
) -> TrainState | None:
    """Restore the newest saved state of a run onto devices; None if there is none.

    Args:
        folder: the run's folder.
        abstract: the shapes of the training state.
        names: the logical axis names of its leaves.
        place: logical axis names -> sharding of an array.
        settings: the configuration of this run; it must equal the saved run's.
        encode: converts a state to its saved form, as for `save`.

    Raises:
        StateError: the configurations differ; names the first difference.
        CheckpointError: a file is damaged.
    """
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)  # left by a killed run
    states = list_saved(folder)
    if not states:
        return None
    newest = states[-1]
    index = Index.open(newest)
    saved_settings = _read_settings(newest)
    for key in sorted(set(settings) | set(saved_settings)):
        if settings.get(key) != saved_settings.get(key):
            raise StateError(
                f"{newest} was trained with {key} = {saved_settings.get(key)!r} and this run has "
                f"{settings.get(key)!r}: use the same, or another folder."
            )
    saved = jax.eval_shape(encode, abstract)
    shapes, shardings = _flatten(saved), place_saved(saved, names, place)
    if set(shapes) != set(index.tensors):
        raise StateError(
            f"{newest} holds other arrays than this version trains: use another folder."
        )
    arrays = {name: jax.device_put(index.view(name), shardings[name]) for name in shapes}
    treedef = jax.tree.structure(saved)
    return dequantize_state(jax.tree.unflatten(treedef, [arrays[name] for name in shapes]))


def place_saved(saved: TrainState, names: TrainState, place: Place) -> dict[str, Sharding]:
    """Compute the shardings of a saved state; a scale lacks its weight's last axes."""

    def pair(leaf: Any, axes_of_leaf: tuple[str, ...]) -> Any:
        if isinstance(leaf, Quantized):
            return Quantized(place(axes_of_leaf), place(axes_of_leaf[: len(leaf.scale.shape)]))
        return place(axes_of_leaf)

    return _flatten(
        jax.tree.map(pair, saved, names, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    )


def name_axes(abstract: TrainState, names: Any) -> TrainState:
    """Name the logical axes of a training state's leaves; moments share their weights' names.

    Args:
        abstract: the shapes of the training state.
        names: the weights' axis names, as `declare_parameters` returns them.
    """
    flat = jax.tree_util.tree_flatten_with_path(names, is_leaf=_is_names)[0]
    by_path = {jax.tree_util.keystr(path): name for path, name in flat}

    def find(path: Any, leaf: Any) -> tuple[str, ...]:
        inner = tuple(key for key in path if isinstance(key, jax.tree_util.DictKey))
        return by_path[jax.tree_util.keystr(inner)] if leaf.ndim else ()

    return jax.tree_util.tree_map_with_path(find, abstract)


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(isinstance(name, str) for name in leaf)


def _flatten(tree: Any) -> dict[str, Any]:
    """Flatten a tree to readable names: `params.text.layer_0.attention.qkv`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_placed)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _is_placed(leaf: Any) -> bool:
    return isinstance(leaf, Sharding)


def _split_into_shards(arrays: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Split the arrays' names, in order, into files of at most `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read the configuration of a saved state, under the current names of its parts."""
    saved = json.loads((folder / INDEX).read_text())["metadata"]["plan"]
    current = {"recipe": "data", "teaching": "hparams"}  # the parts' names in 0.1.0
    parts = ((key.partition("."), value) for key, value in saved.items())
    return {current.get(part, part) + dot + name: value for (part, dot, name), value in parts}
