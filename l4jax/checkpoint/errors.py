"""What a checkpoint that cannot be loaded is refused with."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not this model: one sentence with the way out."""


def list_few(names: Sequence[str], few: int = 3) -> str:
    """The first names of a list, and how many more there are: "a, b, c and 12 more"."""
    shown = ", ".join(names[:few])
    return shown if len(names) <= few else f"{shown} and {len(names) - few} more"
