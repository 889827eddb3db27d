"""The collectives of a compiled step, read off its program. Nothing is allocated or run."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from l4jax import axes, cache, decode
from l4jax.cache import Batch, PageTables
from l4jax.config import Config
from l4jax.engine.local_kernels import make_kernels
from l4jax.kernels import PORTABLE
from l4jax.model import Llama4, declare_parameters
from l4jax.sampling import SAMPLING_METADATA_AXES, SamplingMetadata
from l4jax.strategies import activate
from sharding import Layout

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|ragged-all-to-all|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_PLACE = re.compile(r'op_name="([^"]*)"')
_PAGES = 64  # of the pool, per data shard and stripe
_COLUMNS = 8  # of a page table


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that communicates.

    Attributes:
        kind: XLA's name, such as "all-reduce".
        part: "layers", "embedding", or "sampling", which includes the step's inputs.
        bytes: of its results on one device.
    """

    kind: str
    part: str
    bytes: int


def compile_step(
    config: Config,
    layout: Layout,
    rows: int,
    tokens: int,
    *,
    dtype: Any = jnp.bfloat16,
) -> str:
    """Compile `decode.step` for the shapes of a model, and return the optimized program's text.

    Args:
        config: of the model; images are left out.
        layout: mesh and strategy.
        rows: of each data shard.
        tokens: of each data shard; as many as rows is a decode step.
        dtype: of weights and cache.
    """
    model, text = Llama4(config.text, make_kernels(PORTABLE, layout)), config.text
    shards, stripes = layout.count(axes.ROWS), layout.count(axes.STRIPES)
    page = math.gcd(text.chunk // stripes, 128)
    shapes, names = declare_parameters(dataclasses.replace(config, vision=None), dtype)
    make_pool = functools.partial(
        cache.make_pool, text, shards * stripes * _PAGES, page, jnp.dtype(dtype)
    )
    pool = jax.eval_shape(make_pool)
    state = jax.eval_shape(functools.partial(decode.make_decode_state, shards * rows, text.vocab))
    token, row = (_abstract((shards * count,)) for count in (tokens, rows))
    table = _abstract((shards * rows, _COLUMNS))
    tables = PageTables(table, _abstract((text.nope_interval - 1, *table.shape)))
    floats = jax.ShapeDtypeStruct(row.shape, jnp.float32)
    seeds = jax.ShapeDtypeStruct(row.shape, jnp.uint32)
    arguments = (
        (shapes, names),
        (pool, cache.name_pool_axes(pool)),
        (state, decode.DECODE_STATE_AXES),
        (Batch(token, token, token, tables), cache.name_axes()),
        (
            decode.LogitIndices(_abstract((shards * rows, 1)), row),
            decode.name_logit_indices_axes(has_targets=False),
        ),
        (SamplingMetadata(floats, row, floats, floats, seeds, seeds), SAMPLING_METADATA_AXES),
    )
    placed = [
        jax.tree.map(_place, leaves, layout.place_all(its_names)) for leaves, its_names in arguments
    ]
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, each) for each in placed[1:3])
    static: Any = model  # to pyright, Linen modules are not hashable
    with activate(layout):
        step = decode.jit_step(static, None, shards, *shardings)
        return step.lower(*placed).compile().as_text()


def find_collectives(text: str) -> Iterator[Collective]:
    """Find the collectives in the text of an optimized program.

    Instructions in a branch or in a loop's body count once.
    """
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        result, kind, start, _ = match.groups()
        sizes = [_count_bytes(*array) for array in _ARRAY.findall(result)]
        if start and kind != "all-reduce":  # its result is a pair: operands, and results
            sizes = sizes[len(sizes) // 2 :]
        place = _PLACE.search(line)
        yield Collective(kind, _find_part(place[1] if place else ""), sum(sizes))


def _find_part(place: str) -> str:
    if "layer_" in place:
        return "layers"
    return "embedding" if "embed" in place else "sampling"


def _count_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
