"""Dataset splits: assigned by an example's content, so that no example is in two of them."""

import random
import zlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

SPLITS = ("train", "validation", "test")
PARTS = 20  # equal parts of the examples: one for test, one for validation, 18 for training


class Keyed(Protocol):
    """An example with its content as a key; equal keys mean equal examples."""

    @property
    def key(self) -> str: ...


Example = TypeVar("Example", bound=Keyed)


def assign_split(key: str) -> str:
    """Assign an example to its split by its key."""
    part = zlib.crc32(key.encode()) % PARTS
    return "test" if part == 0 else "validation" if part == 1 else "train"


def sample_from(
    split: str, make: Callable[..., Example], rng: random.Random, *arguments: Any
) -> Example:
    """Call `make(rng, ...)` until its example is in the split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it is one of {', '.join(SPLITS)}.")
    while True:
        example = make(rng, *arguments)
        if assign_split(example.key) == split:
            return example
