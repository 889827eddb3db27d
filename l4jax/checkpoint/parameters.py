"""From safetensors to arrays on devices: each device gets its own slice, and no more is read."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from tqdm import tqdm

from l4jax.checkpoint.names import match
from l4jax.checkpoint.recipe import Recipe, read_box
from l4jax.checkpoint.safetensors import Index
from l4jax.config import Config
from l4jax.model import Parameters, declare_parameters

Place = Callable[[tuple[str, ...]], Sharding]
# That copy out of the mapped files: one alone fills neither a disk nor the memory's bandwidth.
THREADS = 8


def load_parameters(
    folder: str | Path, config: Config, dtype: Any, place: Place, *, progress: bool = True
) -> Parameters:
    """Load a checkpoint in the published layout, plain or sharded, onto devices.

    Host memory holds one slice that is being read and one that is on its way. While an expert
    matrix is transposed, a device holds its slice of that twice.

    Args:
        folder: with safetensors under the published names.
        config: of the model; every parameter that it declares is filled, every stored tensor used.
        dtype: of the parameters; what is stored in another is converted slice by slice.
        place: the sharding of an array whose axes have these logical names, in any order of axes.
        progress: whether to show a bar on standard error.

    Raises:
        CheckpointError: naming what is missing, superfluous, damaged or quantized.
    """
    index = Index.open(folder)
    recipes, names = find_recipes(index, config)
    loaded: dict[str, jax.Array] = {}
    sizes = {
        path: sum(index.tensors[part.name].nbytes for part in recipe.parts)
        for path, recipe in recipes.items()
    }
    with (
        make_bar(sum(sizes.values()), "loading", progress) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for count, (path, recipe) in enumerate(recipes.items(), start=1):
            loaded[path] = load_parameter(index, recipe, names[path], dtype, place, pool)
            bar.set_postfix_str(f"{count}/{len(recipes)} parameters", refresh=False)
            bar.update(sizes[path])
        jax.block_until_ready(loaded)
    return unflatten(loaded)


def find_recipes(
    index: Index, config: Config
) -> tuple[dict[str, Recipe], dict[str, tuple[str, ...]]]:
    """How to make each parameter, in the order of the files; and the logical names of its axes."""
    shapes, names = declare_parameters(config, jnp.float32)
    wanted = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    recipes = match(wanted, index.kinds, str(index.folder))

    def lies_at(path: str) -> tuple[Path, int]:
        tensor = index.tensors[recipes[path].parts[0].name]
        return tensor.path, tensor.begin

    ordered = {path: recipes[path] for path in sorted(recipes, key=lies_at)}
    return ordered, flatten(names)


def load_parameter(
    index: Index, recipe: Recipe, names: tuple[str, ...], dtype: Any, place: Place, pool: Executor
) -> jax.Array:
    """Load one parameter; the last of its slices may still be on the way when it is returned."""
    array = _read_array(index, recipe, place(recipe.reorder(names)), dtype, pool)
    index.release(part.name for part in recipe.parts)
    if recipe.order is None:
        return array
    turned = _make_turn(recipe.order, place(names))(array)
    # Not donated: XLA reuses a buffer for an output of the same shape only. Freed by hand.
    turned.block_until_ready()
    array.delete()
    return turned


def make_bar(total: int, what: str, progress: bool) -> tqdm:
    """A progress bar in bytes on standard error, of the first process alone."""
    shown = progress and jax.process_index() == 0
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not shown,
        dynamic_ncols=True,
        leave=True,
    )


def _read_array(
    index: Index, recipe: Recipe, sharding: Sharding, dtype: Any, pool: Executor
) -> jax.Array:
    """Read each distinct slice once and put it on all devices that want it; then the next.

    `jax.make_array_from_callback` would have all slices of an array in host memory at a time.
    """
    takers: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, box in sharding.addressable_devices_indices_map(recipe.shape).items():
        assert box is not None
        spans = (cut.indices(size)[:2] for cut, size in zip(box, recipe.shape, strict=True))
        takers.setdefault(tuple(spans), []).append(device)
    pieces: list[jax.Array] = []
    for spans, devices in takers.items():
        values = read_box(recipe, index.view, tuple(slice(*span) for span in spans), dtype, pool)
        jax.block_until_ready(pieces)  # so that no more than the last slice is still on its way
        pieces += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(recipe.shape, sharding, pieces)


def flatten(tree: Any) -> dict[str, Any]:
    """A tree of dictionaries as path -> leaf, as in "text/layer_3/attention/qkv"."""
    return dict(flatten_dict(tree, sep="/"))


def unflatten(leaves: Mapping[str, Any]) -> Parameters:
    """The tree that `flatten` came from."""
    return dict(unflatten_dict(dict(leaves), sep="/"))


@functools.cache
def _make_turn(order: tuple[int, ...], sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """A transposition in which no device needs what another has: the sharding turns along."""
    return jax.jit(functools.partial(jnp.transpose, axes=order), out_shardings=sharding)
