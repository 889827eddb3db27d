"""How stored matrices become a parameter: the shapes on both sides, and what lies where.

Each rule takes the parameter's shape and the names of the stored tensors.
"""

import math
from collections.abc import Iterable

from l4jax.checkpoint.recipe import Part, Recipe

Shape = tuple[int, ...]


def take(shape: Shape, name: str) -> Recipe:
    """One tensor: a vector, or a matrix `[out, in]` whose `in` may have several axes here."""
    stored = shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    return Recipe((Part(name, stored, (0,) * len(shape), shape),), shape)


def stack(shape: Shape, *names: str) -> Recipe:
    """Matrices `[out, in]`, one after another on a new first axis; `out` may be several axes."""
    return _stack(shape, names, (math.prod(shape[1:-1]), shape[-1]))


def stack_biases(shape: Shape, *names: str) -> Recipe:
    """Vectors, one after another on a new first axis."""
    return _stack(shape, names, (math.prod(shape[1:]),))


def _stack(shape: Shape, names: Iterable[str], stored: Shape) -> Recipe:
    rest = (0,) * (len(shape) - 1)
    parts = (Part(name, stored, (i, *rest), (1, *shape[1:])) for i, name in enumerate(names))
    return Recipe(tuple(parts), shape)


def join_heads(shape: Shape, query: str, key: str, value: str) -> Recipe:
    """[K, G + 2, H, D]: of each kv head its query heads, its key and its value.

    The files pair neighboring elements in RoPE, as we do: no permutation within a head.
    """
    kv_heads, rows, head_dim, width = shape
    parts = []
    for name, start, count in ((query, 0, rows - 2), (key, rows - 2, 1), (value, rows - 1, 1)):
        box = (kv_heads, count, head_dim, width)
        parts.append(Part(name, (math.prod(box[:-1]), width), (0, start, 0, 0), box))
    return Recipe(tuple(parts), shape)


def turn_experts(shape: Shape, name: str) -> Recipe:
    """Fused experts: stored `[E, in, out]`, the gate first in `out`; ours end in `in`."""
    in_file = (shape[0], shape[-1], *shape[1:-1])
    stored = (*in_file[:2], math.prod(in_file[2:]))
    order = (0, *range(2, len(shape)), 1)
    return Recipe((Part(name, stored, (0,) * len(shape), in_file),), in_file, order)


def stack_experts(shape: Shape, *names: str) -> Recipe:
    """Experts that are stored one by one as matrices `[out, in]`, as the quantizers write them."""
    parts, box = [], (1,) * (len(shape) - 2) + shape[-2:]
    for expert in range(shape[0]):
        for i, name in enumerate(names):
            start = (expert, i, 0, 0) if len(shape) == 4 else (expert, 0, 0)
            parts.append(Part(name.replace("#", str(expert)), shape[-2:], start, box))
    return Recipe(tuple(parts), shape)
