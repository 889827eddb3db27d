"""The tables: where each logical axis lives. One table a strategy, each a diff of another.

A name that is in no table is an error: an axis that nobody placed must not be replicated silently.
"""

import dataclasses
from collections.abc import Mapping

from sharding.mesh import DATA, MODEL


@dataclasses.dataclass(frozen=True)
class Rules:
    """A strategy: its name, and the mesh axis of each logical axis (None: on every device)."""

    name: str
    table: Mapping[str, str | None]

    def change(self, name: str, **table: str | None) -> "Rules":
        """Another strategy, told by what it does differently. A new axis is refused."""
        unknown = set(table) - set(self.table)
        if unknown:
            raise KeyError(f"strategy {name}: no such logical axis: {', '.join(sorted(unknown))}")
        return Rules(name, {**self.table, **table})

    def find(self, axis: str) -> str | None:
        """The mesh axis of a logical axis. Raises KeyError for a name that is in no rule."""
        if axis not in self.table:
            raise KeyError(f"the axis {axis!r} is in no rule of the strategy {self.name!r}")
        return self.table[axis]


REPLICATED = Rules(
    "replicated",
    dict.fromkeys(
        (
            *("vocab", "width", "kv_heads", "queries", "queries_kv", "head_dim"),
            *("experts", "hidden", "gate_up"),
            *("vision_width", "vision_heads", "vision_head_dim", "vision_hidden", "qkv"),
            *("patch", "patches", "adapter_input", "adapter_hidden", "adapter_width"),
            *("rank", "parts"),
            *("tokens", "rows", "slots", "pages", "page", "table", "groups"),
            *("tiles", "features", "channels", "pixels_y", "pixels_x", "layers", "list"),
        )
    ),
)

# Megatron's cut: heads and the inside of every feed-forward block over `model`, two sums a layer;
# the vocabulary too. Requests, with their pages, over `data`; weights whole on each data shard.
TENSOR = REPLICATED.change(
    "tensor",
    vocab=MODEL,
    kv_heads=MODEL,
    hidden=MODEL,
    vision_heads=MODEL,
    vision_hidden=MODEL,
    adapter_hidden=MODEL,
    tokens=DATA,
    rows=DATA,
    pages=DATA,
)

# The same, and tiles over `data` too: in training a step has as many of them as it has rows.
TRAINING = TENSOR.change("training", tiles=DATA)

STRATEGIES = {rules.name: rules for rules in (TENSOR, TRAINING)}
