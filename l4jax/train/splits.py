"""Train, validation and test: told by what an example says, so that none is in two of them."""

import random
import zlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

SPLITS = ("train", "validation", "test")
PARTS = 20  # of the examples: one for the test, one for validation, the others for training


class Keyed(Protocol):
    """Anything that says in one text what it holds: the same text is the same example."""

    @property
    def key(self) -> str: ...


Example = TypeVar("Example", bound=Keyed)


def find_split(key: str) -> str:
    """The only split that an example with this key may be in."""
    part = zlib.crc32(key.encode()) % PARTS
    return "test" if part == 0 else "validation" if part == 1 else "train"


def draw_from(
    split: str, make: Callable[..., Example], rng: random.Random, *arguments: Any
) -> Example:
    """The first example of a split that `make(rng, ...)` comes up with."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it is one of {', '.join(SPLITS)}.")
    while True:
        example = make(rng, *arguments)
        if find_split(example.key) == split:
            return example
