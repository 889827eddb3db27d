"""Rule tables: the mesh axis of each logical axis. A strategy is a diff of another strategy.

A name without a rule is an error: a misspelt axis must not be replicated silently.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeAlias

# Mesh axes that cut a logical axis, the outermost first; None: replicated.
Place: TypeAlias = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """A strategy: its name, and the mesh axis or axes of each logical axis (None: replicated)."""

    name: str
    table: Mapping[str, Place]

    @classmethod
    def replicate(cls, name: str, axes: Iterable[str]) -> "Rules":
        """Return the strategy that replicates all these logical axes."""
        return cls(name, dict.fromkeys(axes))

    def change(self, name: str, table: Mapping[str, Place]) -> "Rules":
        """Return a strategy that differs from this one in `table`.

        Raises:
            KeyError: for a logical axis that this strategy does not have.
        """
        unknown = set(table) - set(self.table)
        if unknown:
            raise KeyError(f"strategy {name}: no such logical axis: {', '.join(sorted(unknown))}")
        return Rules(name, {**self.table, **table})

    def find(self, axis: str) -> tuple[str, ...]:
        """Return the mesh axes of a logical axis. Raises KeyError for a name without a rule."""
        if axis not in self.table:
            raise KeyError(f"the axis {axis!r} is in no rule of the strategy {self.name!r}")
        place = self.table[axis]
        return (place,) if isinstance(place, str) else place or ()
