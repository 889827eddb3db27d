"""A mesh and a rule table together: from the names of an array's axes to its sharding."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import MeshError, describe
from sharding.rules import Rules

Names = tuple[str, ...]

_lax: Any = jax.lax  # the type of psum is partially unknown


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placement of arrays under one strategy on one mesh."""

    mesh: Mesh
    rules: Rules

    def count(self, axis: str) -> int:
        """Return the number of shards of a logical axis."""
        place = self.rules.find(axis)
        return 1 if place is None else self.mesh.shape[place]

    def spec(self, names: Names) -> PartitionSpec:
        """Return the partition of an array whose axes have these logical names."""
        return PartitionSpec(*(self.rules.find(name) for name in names))

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
        axis = None if sum_over is None else self.rules.find(sum_over)

        def sum_results(*arguments: Any) -> Any:
            return _lax.psum(fn(*arguments), axis)

        run = fn if axis is None else sum_results
        specs = jax.tree.map(self.spec, (ins, outs), is_leaf=_is_names)
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )

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
            text = "x".join(str(n) for n in self.mesh.shape.values() if n > 1)
            fits = [n for n in range(1, size + 1) if size % n == 0 and n < parts]
            place = str(self.rules.find(axis))
            raise MeshError(
                f"--mesh {text}: {parts} devices cannot share {size} {elements}; the {place} axis "
                f"may have {' or '.join(map(str, fits[-3:]))} here: "
                f"{describe({**self.mesh.shape, place: fits[-1]})}."
            )


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(
        isinstance(name, str) for name in cast(tuple[object, ...], leaf)
    )
