"""Orbax checkpoints in l4jax's own layout: they load onto any mesh without transposing."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from l4jax import axes
from l4jax.checkpoint.adapter import Adapter
from l4jax.checkpoint.errors import CheckpointError, list_few
from l4jax.checkpoint.online_quantization import OnlineQuantization
from l4jax.checkpoint.parameters import Place, flatten, make_progress_bar, unflatten
from l4jax.config import Config
from l4jax.model import Parameters, declare_parameters

FOLDER = "orbax"  # in the model's folder
# Bytes that are read at a time, so that reading a slice costs little more than its bytes.
_CHUNK_BYTES = 8 * 2**20
# Axes that meshes shard: a chunk has one expert, one head.
_CHUNKED_AXES = (axes.EXPERTS, axes.KV_HEADS, axes.VISION_HEADS)


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A parameter that is read when it is about to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _DeferredHandler(type_handlers.NumpyHandler):
    """A handler that writes one parameter at a time: Orbax itself would hold all of them."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []


def save(
    folder: str | Path, parameters: Mapping[str, Deferred], names: Mapping[str, tuple[str, ...]]
) -> None:
    """Write `folder/orbax`, one parameter at a time.

    Memory holds one parameter, and the temporaries of its `read`.

    Args:
        folder: gets `orbax/`, which must not exist yet.
        parameters: path ("text/layer_3/attention/qkv") -> deferred values.
        names: path -> the logical names of its axes, which determine its chunks.
    """
    registry = type_handlers.create_type_handler_registry(
        (Deferred, _DeferredHandler()), (jax.Array, type_handlers.ArrayHandler())
    )
    save_args = {
        path: ocp.SaveArgs(
            chunk_byte_size=_CHUNK_BYTES,
            shard_axes=tuple(
                axis for axis, name in enumerate(names[path]) if name in _CHUNKED_AXES
            ),
        )
        for path in parameters
    }
    # Uncompressed: the disk bounds loading, not the processors.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            Path(folder).absolute() / FOLDER,
            args=ocp.args.PyTreeSave(unflatten(parameters), save_args=unflatten(save_args)),
        )


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
    """Load `folder/orbax` layer by layer, each device its own slices; parameters that are to be
    quantized, one by one.

    Args and errors are those of `l4jax.checkpoint.load`.
    """
    path = Path(folder).absolute() / FOLDER
    declared, named = declare_parameters(config, dtype)
    shapes, names = flatten(declared), flatten(named)
    _check_specs(path, shapes, read_specs(folder))
    in_axes_of = {
        name: online_quantization and online_quantization.count_in_axes(name) for name in shapes
    }
    layers: dict[str, list[str]] = {}
    for name in shapes:
        layer = name if in_axes_of[name] else "/".join(name.split("/")[:2])
        layers.setdefault(layer, []).append(name)
    loaded: dict[str, Any] = {}
    largest = max(
        np.prod(place(names[name]).shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize
        for name, leaf in shapes.items()
    )
    # Orbax refuses slices beyond this limit, counted in whole chunks and the file's dtype.
    limit = 4 + int(8 * largest // 10**9)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    with (
        make_progress_bar(total, "loading", progress) as bar,
        ocp.Checkpointer(handler) as checkpointer,
    ):
        for layer in layers.values():
            item = {name: shapes[name] for name in layer}
            restore_args = {
                name: ocp.ArrayRestoreArgs(
                    sharding=place(names[name]), global_shape=leaf.shape, dtype=leaf.dtype
                )
                for name, leaf in item.items()
            }
            args = ocp.args.PyTreeRestore(
                item=unflatten(item), restore_args=unflatten(restore_args), partial_restore=True
            )
            arrays = flatten(_restore(checkpointer, path, args))
            bar.update(sum(array.nbytes for array in arrays.values()))
            for name, array in arrays.items():
                array = lora.merge(name, array) if lora else array
                in_axes = in_axes_of[name]
                loaded[name] = (
                    online_quantization.quantize(array, in_axes, names[name], place)
                    if online_quantization and in_axes
                    else array
                )
    return unflatten(loaded)


def _restore(checkpointer: ocp.Checkpointer, path: Path, args: Any) -> Any:
    try:
        return jax.block_until_ready(checkpointer.restore(path, args=args))
    except Exception as error:
        # Orbax wraps the storage's errors in a plain Exception, with pages of its settings.
        if type(error) is not Exception and not isinstance(
            error, ValueError | OSError | RecursionError
        ):
            raise
        cause = str(error.__cause__ or error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{path} is damaged ({cause}): convert the model again with python -m l4jax.convert."
        ) from error


def choose_dtype(folder: str | Path) -> str:
    """Choose the dtype to compute in: that of the converted parameters."""
    return str(next(iter(read_specs(folder).values()))[0])


def read_specs(folder: str | Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Read path -> (dtype, shape) of every array in `folder/orbax`.

    Raises:
        CheckpointError: it is no complete Orbax checkpoint.
    """
    path = Path(folder).absolute() / FOLDER
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree  # pyright: ignore
        specs = {
            name: (np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in flatten(tree).items()
        }
    except (ValueError, OSError, KeyError, AttributeError, TypeError, RecursionError):
        specs = {}
    if not specs:
        raise CheckpointError(
            f"{path} is not a complete Orbax checkpoint: "
            "convert the model again with python -m l4jax.convert."
        )
    return specs


def _check_specs(path: Path, shapes: Mapping[str, Any], specs: Mapping[str, Any]) -> None:
    problems = {
        "lacks": sorted(set(shapes) - set(specs)),
        "has unknown": sorted(set(specs) - set(shapes)),
        "has": [
            f"{name} {list(specs[name][1])} instead of {list(shapes[name].shape)}"
            for name in shapes
            if name in specs and specs[name][1] != shapes[name].shape
        ],
    }
    if found := [f"{how} {list_few(names)}" for how, names in problems.items() if names]:
        raise CheckpointError(
            f"{path} {' and '.join(found)}: "
            "it was not converted from the model in its config.json; convert again."
        )
