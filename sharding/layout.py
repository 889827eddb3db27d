"""A mesh and a table together: from the names of an array's axes to where it lives."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import MeshError, describe
from sharding.rules import Rules

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things live under one strategy on one mesh."""

    mesh: Mesh
    rules: Rules

    def count(self, axis: str) -> int:
        """Parts that a logical axis is cut into."""
        place = self.rules.find(axis)
        return 1 if place is None else self.mesh.shape[place]

    def spec(self, names: Names) -> PartitionSpec:
        """The partition of an array whose axes have these logical names."""
        return PartitionSpec(*(self.rules.find(name) for name in names))

    def place(self, names: Names) -> NamedSharding:
        """The sharding of an array whose axes have these logical names."""
        return NamedSharding(self.mesh, self.spec(names))

    def place_all(self, names: Any) -> Any:
        """`place` over a tree whose leaves are tuples of names."""
        return jax.tree.map(self.place, names, is_leaf=_is_names)

    def local(
        self, fn: Callable[..., Any], ins: Any, outs: Any, sum_over: str | None = None
    ) -> Callable[..., Any]:
        """Run a function on each device's own part of its arguments (`shard_map`).

        Args:
            fn: takes and returns the local parts.
            ins, outs: names of the axes of each argument and of the result.
            sum_over: a logical axis that the function contracts; the parts of its result are added
                up.
        """
        axis = None if sum_over is None else self.rules.find(sum_over)

        def run(*arguments: Any) -> Any:
            result = fn(*arguments)
            return result if axis is None else jax.lax.psum(result, axis)

        specs = jax.tree.map(self.spec, (ins, outs), is_leaf=_is_names)
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )

    def check(self, axis: str, size: int, what: str) -> None:
        """Refuse a mesh that does not cut `size` things evenly; `what` names them."""
        parts = self.count(axis)
        if size % parts:
            text = "x".join(str(n) for n in self.mesh.shape.values() if n > 1)
            fits = [n for n in range(1, size + 1) if size % n == 0 and n < parts]
            place = str(self.rules.find(axis))
            raise MeshError(
                f"--mesh {text}: {parts} devices cannot share {size} {what}; the {place} axis may "
                f"have {' or '.join(map(str, fits[-3:]))} here: "
                f"{describe({**self.mesh.shape, place: fits[-1]})}."
            )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Trace and run under this layout: its mesh is set, the axis names mean its table."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(tuple(self.rules.table.items())):
            yield


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(isinstance(name, str) for name in leaf)
