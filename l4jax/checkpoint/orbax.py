"""Orbax checkpoints in our own layout: they load onto any mesh, and nothing is transposed."""

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
from l4jax.checkpoint.parameters import Place, flatten, make_bar, unflatten
from l4jax.config import Config
from l4jax.model import Parameters, declare_parameters

FOLDER = "orbax"  # beside config.json
# Bytes that are read at a time, so that a slice costs little more than itself.
_CHUNK = 8 * 2**20
# Axes cut into single chunks, since meshes cut them: one expert, one head.
_CUT = (axes.EXPERTS, axes.KV_HEADS, axes.VISION_HEADS)


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A parameter that is made when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _DeferredHandler(type_handlers.NumpyHandler):
    """Writes one parameter after another: Orbax itself would hold all of them at a time."""

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
    """Write `folder/orbax`, one parameter at a time: memory holds one, and what its `read` needs.

    Args:
        folder: that gets `orbax/`, which must not be there yet.
        parameters: path ("text/layer_3/attention/qkv") -> what gives its values.
        names: path -> the logical names of its axes, which decide how it is cut into chunks.
    """
    registry = type_handlers.create_type_handler_registry(
        (Deferred, _DeferredHandler()), (jax.Array, type_handlers.ArrayHandler())
    )
    cuts = {
        path: ocp.SaveArgs(
            chunk_byte_size=_CHUNK,
            shard_axes=tuple(axis for axis, name in enumerate(names[path]) if name in _CUT),
        )
        for path in parameters
    }
    # Uncompressed: loading is bound by the disk, not by the processors.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            Path(folder).absolute() / FOLDER,
            args=ocp.args.PyTreeSave(unflatten(parameters), save_args=unflatten(cuts)),
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
    """Load `folder/orbax`, each device its own slice, layer by layer; what is to be quantized, one
    by one.

    Args, errors: as `l4jax.checkpoint.load`.
    """
    path = Path(folder).absolute() / FOLDER
    declared, named = declare_parameters(config, dtype)
    shapes, names = flatten(declared), flatten(named)
    _check(path, shapes, read_kinds(folder))
    layers: dict[str, list[str]] = {}
    inners = {
        name: online_quantization and online_quantization.count_inner(name) for name in shapes
    }
    for name in shapes:
        part = name if inners[name] else "/".join(name.split("/")[:2])
        layers.setdefault(part, []).append(name)
    loaded: dict[str, Any] = {}
    largest = max(
        np.prod(place(names[name]).shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize
        for name, leaf in shapes.items()
    )
    # Orbax refuses a slice beyond its limit, and counts it in whole chunks and the file's dtype.
    limit = 4 + int(8 * largest // 10**9)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    with make_bar(total, "loading", progress) as bar, ocp.Checkpointer(handler) as checkpointer:
        for layer in layers.values():
            item = {name: shapes[name] for name in layer}
            arguments = {
                name: ocp.ArrayRestoreArgs(
                    sharding=place(names[name]), global_shape=leaf.shape, dtype=leaf.dtype
                )
                for name, leaf in item.items()
            }
            wanted = ocp.args.PyTreeRestore(
                item=unflatten(item), restore_args=unflatten(arguments), partial_restore=True
            )
            arrays = flatten(_restore(checkpointer, path, wanted))
            bar.update(sum(array.nbytes for array in arrays.values()))
            for name, array in arrays.items():
                array = lora.merge(name, array) if lora else array
                inner = inners[name]
                loaded[name] = (
                    online_quantization.quantize(array, inner, names[name], place)
                    if online_quantization and inner
                    else array
                )
    return unflatten(loaded)


def _restore(checkpointer: ocp.Checkpointer, path: Path, wanted: Any) -> Any:
    try:
        return jax.block_until_ready(checkpointer.restore(path, args=wanted))
    except Exception as error:
        # A plain Exception is what Orbax wraps the storage's errors in, with pages of its settings.
        if type(error) is not Exception and not isinstance(error, ValueError | OSError):
            raise
        cause = str(error.__cause__ or error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{path} is damaged ({cause}): convert the model again with python -m l4jax.convert."
        ) from error


def find_dtype(folder: str | Path) -> str:
    """What to compute in: the dtype that the parameters were converted to."""
    return str(next(iter(read_kinds(folder).values()))[0])


def read_kinds(folder: str | Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Path -> (dtype, shape) of every array in `folder/orbax`.

    Raises `CheckpointError` where that is not a whole Orbax checkpoint.
    """
    path = Path(folder).absolute() / FOLDER
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree  # pyright: ignore
        kinds = {
            name: (np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in flatten(tree).items()
        }
    except (ValueError, OSError, KeyError, AttributeError):
        kinds = {}
    if not kinds:
        raise CheckpointError(
            f"{path} is not a whole Orbax checkpoint: "
            "convert the model again with python -m l4jax.convert."
        )
    return kinds


def _check(path: Path, shapes: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    problems = {
        "lacks": sorted(set(shapes) - set(kinds)),
        "has unknown": sorted(set(kinds) - set(shapes)),
        "has": [
            f"{name} {list(kinds[name][1])} instead of {list(shapes[name].shape)}"
            for name in shapes
            if name in kinds and kinds[name][1] != shapes[name].shape
        ],
    }
    if found := [f"{how} {list_few(names)}" for how, names in problems.items() if names]:
        raise CheckpointError(
            f"{path} {' and '.join(found)}: "
            "it was not converted from the model in its config.json; convert again."
        )
