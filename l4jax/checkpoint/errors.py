# pyright: strict
"""The error of a checkpoint that cannot be read or written."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not this model: one sentence with the way out."""


def list_few(names: Sequence[str], few: int = 3) -> str:
    """Format the first names of a list and the number of the rest: "a, b, c and 12 more"."""
    shown = ", ".join(names[:few])
    return shown if len(names) <= few else f"{shown} and {len(names) - few} more"
