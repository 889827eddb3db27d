"""A mesh and a rule table together: from the names of an array's axes to its sharding."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import MODEL, SEQ, MeshError, describe
from sharding.rules import Rules

Names = tuple[str, ...]

_lax: Any = jax.lax  # the type of psum is partially unknown


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placement of arrays under one strategy on one mesh."""

    mesh: Mesh
    rules: Rules

    def find(self, axis: str) -> tuple[str, ...]:
        """Return the mesh axes of more than one device that cut a logical axis."""
        return tuple(place for place in self.rules.find(axis) if self.mesh.shape[place] > 1)

    def count(self, axis: str) -> int:
        """Return the number of shards of a logical axis."""
        return math.prod(self.mesh.shape[place] for place in self.find(axis))

    def spec(self, names: Names) -> PartitionSpec:
        """Return the partition of an array whose axes have these logical names."""
        places = map(self.rules.find, names)
        # A single mesh axis stands alone: jax compares partitions by their spelling.
        return PartitionSpec(*(found[0] if len(found) == 1 else found or None for found in places))

    def place(self, names: Names) -> NamedSharding:
        """Return the sharding of an array whose axes have these logical names."""
        return NamedSharding(self.mesh, self.spec(names))

    def place_all(self, names: Any) -> Any:
        """Return `place` of each leaf of a tree whose leaves are tuples of names."""
        return jax.tree.map(self.place, names, is_leaf=_is_names)

    def local(
        self, fn: Callable[..., Any], ins: Any, outs: Any, sum_over: str | None = None
    ) -> Callable[..., Any]:
        """Make a function that runs on each device's shard of its arguments (`shard_map`).

        Args:
            fn: takes and returns local shards.
            ins, outs: names of the axes of each argument and of the result.
            sum_over: a logical axis that the function contracts; the partial results of its shards
                are summed (`psum`).
        """
        summed = () if sum_over is None else self.find(sum_over)

        def sum_results(*arguments: Any) -> Any:
            return _lax.psum(fn(*arguments), summed)

        run = sum_results if summed else fn
        specs = jax.tree.map(self.spec, (ins, outs), is_leaf=_is_names)
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )

    def find_index(self, axis: str) -> Any:
        """Return the index of a device's shard of a logical axis, inside a `local` function."""
        return _lax.axis_index(self.find(axis))

    def check(self, axis: str, size: int, elements: str) -> None:
        """Refuse a mesh that does not divide a logical axis evenly.

        Args:
            axis: its name.
            size: its length.
            elements: the plural that names them in the error, such as "kv heads".

        Raises:
            MeshError: with a mesh that divides it.
        """
        parts = self.count(axis)
        if size % parts:
            shape, places = dict(self.mesh.shape), self.find(axis)
            place = MODEL if MODEL in places else places[-1]
            others = parts // shape[place]
            fits = [n for n in range(1, shape[place]) if size % (n * others) == 0]
            advice = f"no size of the {place} axis divides them; take smaller other axes."
            if fits:
                advice = (
                    f"the {place} axis may have {' or '.join(map(str, fits[-3:]))} here: "
                    f"{describe({**shape, place: fits[-1]})}."
                )
            raise MeshError(
                f"--mesh {_format(shape)}: {parts} devices cannot share {size} {elements}; {advice}"
            )


def _format(shape: dict[str, int]) -> str:
    """Format a mesh as users write it."""
    if shape.get(SEQ, 1) > 1:
        return describe({name: size for name, size in shape.items() if size > 1})
    return "x".join(str(size) for size in shape.values() if size > 1)


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(
        isinstance(name, str) for name in cast(tuple[object, ...], leaf)
    )
