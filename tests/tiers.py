"""Cases for the default tier of tests; the other cases of the same law are marked slow."""

from collections.abc import Sequence
from typing import Any

import pytest


def every(step: int, values: Sequence[Any]) -> list[Any]:
    """All values, of which each `step`-th one is in the default tier."""
    return [_mark(i % step == 0, value) for i, value in enumerate(values)]


def pairs(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """All pairs. Each item of `first` has one partner in the default tier, in turn; the list that
    is longer comes first, so that each item of both is there."""
    count = len(second)
    assert len(first) >= count
    return [
        _mark((i + i // count) % count == j, one, other)
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]


def _mark(is_default: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if is_default else pytest.mark.slow)
