"""Layouts in which checkpoints store a parameter, as recipes.

Each function takes the parameter's shape and the names of the stored tensors.
"""

import math
from collections.abc import Iterable

from l4jax.checkpoint.recipe import Recipe, Source

Shape = tuple[int, ...]


def reshape_tensor(shape: Shape, name: str) -> Recipe:
    """Make a parameter from one vector, or from a matrix `[out, in]` with `in` split into axes."""
    stored = shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    return Recipe((Source(name, stored, (0,) * len(shape), shape),), shape)


def stack_matrices(shape: Shape, *names: str) -> Recipe:
    """Stack matrices `[out, in]` on a new first axis, with `out` split into axes."""
    return _stack(shape, names, (math.prod(shape[1:-1]), shape[-1]))


def stack_biases(shape: Shape, *names: str) -> Recipe:
    """Stack vectors on a new first axis."""
    return _stack(shape, names, (math.prod(shape[1:]),))


def _stack(shape: Shape, names: Iterable[str], stored: Shape) -> Recipe:
    rest = (0,) * (len(shape) - 1)
    sources = (Source(name, stored, (i, *rest), (1, *shape[1:])) for i, name in enumerate(names))
    return Recipe(tuple(sources), shape)


def join_heads(shape: Shape, query: str, key: str, value: str) -> Recipe:
    """Join Q, K and V as [K, G + 2, H, D]: each kv head's query heads, then its key and its value.

    The files pair neighboring elements in RoPE, as l4jax does: no permutation within a head.
    """
    kv_heads, rows, head_dim, width = shape
    sources = []
    for name, start, count in ((query, 0, rows - 2), (key, rows - 2, 1), (value, rows - 1, 1)):
        box = (kv_heads, count, head_dim, width)
        sources.append(Source(name, (math.prod(box[:-1]), width), (0, start, 0, 0), box))
    return Recipe(tuple(sources), shape)


def transpose_fused_experts(shape: Shape, name: str) -> Recipe:
    """Transpose fused experts: stored `[E, in, out]`, gate before up in `out`; `in` comes last."""
    in_file = (shape[0], shape[-1], *shape[1:-1])
    stored = (*in_file[:2], math.prod(in_file[2:]))
    permutation = (0, *range(2, len(shape)), 1)
    return Recipe((Source(name, stored, (0,) * len(shape), in_file),), in_file, permutation)


def stack_unfused_experts(shape: Shape, *names: str) -> Recipe:
    """Stack experts that are stored as matrices `[out, in]`, as quantizers write them."""
    sources, box = [], (1,) * (len(shape) - 2) + shape[-2:]
    for expert in range(shape[0]):
        for i, name in enumerate(names):
            start = (expert, i, 0, 0) if len(shape) == 4 else (expert, 0, 0)
            sources.append(Source(name.replace("#", str(expert)), shape[-2:], start, box))
    return Recipe(tuple(sources), shape)
