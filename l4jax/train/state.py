"""What outlives a process: weights and optimizer, in 5 bytes a weight, and exactly resumable.

What is saved is rounded, unless it is asked to be kept: weights and second moments to bfloat16,
first moments to e4m3 with a scale for each row. Training goes on from what was saved, whether the
process ends there or not, so that a run that was killed and resumed is, bit for bit, the one that
was not.
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
from l4jax.train.learning import Learned

SHARD_BYTES = 15 * 2**20  # of a file, at most, the header aside

Place = Callable[[tuple[str, ...]], Sharding]
Form = Callable[[Learned], Learned]


class StateError(ValueError):
    """A saved state that this training cannot go on from, said in one sentence."""


@jax.jit
def narrow(learned: Learned) -> Learned:
    """As it is saved."""

    def round_leaf(path: Any, leaf: jax.Array) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        is_first_moment = ".mu" in jax.tree_util.keystr(path)
        if is_first_moment and leaf.ndim > 1:
            return quantize_fp8(leaf, 1)
        return leaf.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(round_leaf, learned)


def keep(learned: Learned) -> Learned:
    """In place of `narrow`: saved as it is, in 12 bytes a weight."""
    return learned


@jax.jit
def widen(saved: Learned) -> Learned:
    """As training has it. In one program with `narrow`, XLA might leave the rounding out."""

    def restore_leaf(leaf: Any) -> jax.Array:
        if isinstance(leaf, Quantized):
            return dequantize(leaf, jnp.float32)
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float32) if is_float else leaf

    return jax.tree.map(restore_leaf, saved, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def save(folder: Path, learned: Learned, plan: Mapping[str, Any], form: Form = narrow) -> Learned:
    """Write `folder/step-N`, whole or not at all, remove older ones, and return what to go on from.

    Args:
        folder: of the run.
        learned: at step N.
        plan: what the run follows from, as JSON values; `restore` compares it.
        form: as which it is saved.
    """
    saved = form(learned)
    step = int(saved.step)
    target, unfinished = folder / f"step-{step:08}", folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    arrays = {name: np.asarray(leaf) for name, leaf in _flatten(saved).items()}
    shards = _cut(arrays)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"state-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(unfinished / name, {key: arrays[key] for key in shard})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"step": step, "plan": plan}, "weight_map": weight_map}
    (unfinished / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.replace(target)
    for older in list_saved(folder)[:-1]:
        shutil.rmtree(older)
    return widen(saved)


def list_saved(folder: Path) -> list[Path]:
    """The saved states of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def restore(
    folder: Path,
    abstract: Learned,
    names: Learned,
    place: Place,
    plan: Mapping[str, Any],
    form: Form = narrow,
) -> Learned | None:
    """The newest saved state of a run on devices; None if there is none.

    Args:
        folder: of the run.
        abstract: shapes of what training has.
        names: of the axes of its leaves.
        place: the sharding of an array whose axes have these logical names.
        plan: of the run that goes on; another than that of the saved one is refused.
        form: as which it was saved.

    Raises:
        StateError: for a plan that differs, naming what does.
        CheckpointError: for files that are damaged.
    """
    found = list_saved(folder)
    if not found:
        return None
    index = Index.open(found[-1])
    saved_plan = json.loads((found[-1] / INDEX).read_text())["metadata"]["plan"]
    for key in sorted(set(plan) | set(saved_plan)):
        if plan.get(key) != saved_plan.get(key):
            raise StateError(
                f"{found[-1]} was trained with {key} = {saved_plan.get(key)!r} and this run has "
                f"{plan.get(key)!r}: use the same, or another folder."
            )
    formed = jax.eval_shape(form, abstract)
    shapes, places = _flatten(formed), place_saved(formed, names, place)
    if set(shapes) != set(index.tensors):
        raise StateError(
            f"{found[-1]} holds other arrays than this version trains: use another folder."
        )
    arrays = {name: jax.device_put(index.view(name), places[name]) for name in shapes}
    treedef = jax.tree.structure(formed)
    return widen(jax.tree.unflatten(treedef, [arrays[name] for name in shapes]))


def place_saved(saved: Learned, names: Learned, place: Place) -> dict[str, Sharding]:
    """Where the leaves of a saved state live: as those of training; scales lack the last axes."""

    def pair(leaf: Any, axes_of_leaf: tuple[str, ...]) -> Any:
        if isinstance(leaf, Quantized):
            return Quantized(place(axes_of_leaf), place(axes_of_leaf[: len(leaf.scale.shape)]))
        return place(axes_of_leaf)

    return _flatten(
        jax.tree.map(pair, saved, names, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    )


def name_axes(abstract: Learned, names: Any) -> Learned:
    """The logical names of the axes of all that is learned: moments have those of their weights.

    Args:
        abstract: shapes.
        names: of the weights' axes, as `declare_parameters` gives them.
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
    """Leaves by readable names: `params.text.layer_0.attention.qkv`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_placed)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _is_placed(leaf: Any) -> bool:
    return isinstance(leaf, Sharding)


def _cut(arrays: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Names in files of at most `SHARD_BYTES`, in order."""
    shards: list[list[str]] = [[]]
    taken = 0
    for name, array in arrays.items():
        if shards[-1] and taken + array.nbytes > SHARD_BYTES:
            shards.append([])
            taken = 0
        shards[-1].append(name)
        taken += array.nbytes
    return shards
