"""A step communicates what its strategy says, and never weights or pages."""

import collections

import jax.numpy as jnp
import pytest

from l4jax.benchmark.collectives import Collective, compile_step, find_collectives
from l4jax.config import MAVERICK, SCOUT, TINY
from l4jax.strategies import choose_strategy
from sharding import Layout, make_mesh

LAYERS = 4  # one global, and of Maverick's two with experts
# Mesh -> collectives of four layers of Scout's kind in a decode step, and in a prefill whose tokens
# are sent to their experts.
REDUCED = {"all-reduce": 2 * LAYERS}
TABLE = {
    "8": (REDUCED, REDUCED),
    "2x4": (REDUCED, REDUCED),
    "4 experts": (REDUCED, REDUCED),
    # Tokens and their experts are gathered; attention, and each layer's sum over `model`.
    "2x2 experts": (
        {**REDUCED, "all-gather": 2 * LAYERS, "reduce-scatter": LAYERS},
        # Tokens and their experts leave, outputs return; how many rounds is one more reduction.
        {"all-reduce": 3 * LAYERS, "all-to-all": 3 * LAYERS},
    ),
    # The global layer merges its parts: one gather of few tokens, two reductions of many.
    "seq=2,model=4": ({**REDUCED, "all-gather": 1}, {"all-reduce": 2 * LAYERS + 2}),
    "data=2,seq=2,model=2": ({**REDUCED, "all-gather": 1}, {"all-reduce": 2 * LAYERS + 2}),
    "seq=2,model=2 experts": ({**REDUCED, "all-gather": 1}, {"all-reduce": 2 * LAYERS + 2}),
}


def find(config, mesh: str, rows: int, tokens: int) -> list[Collective]:
    shape, _, strategy = mesh.partition(" ")
    rules = choose_strategy(shape, enable_expert_parallel=strategy == "experts")
    layout = Layout(make_mesh(shape), rules)
    few = config.replace_text(layers=LAYERS)
    return list(find_collectives(compile_step(few, layout, rows, tokens, dtype=jnp.float32)))


@pytest.mark.parametrize("mesh", TABLE)
def test_the_layers_communicate_what_the_table_of_their_strategy_says(mesh):
    for expected, rows, tokens in zip(TABLE[mesh], (2, 1), (2, 256), strict=True):
        found = find(TINY, mesh, rows, tokens)
        kinds = collections.Counter(each.kind for each in found if each.part == "layers")
        assert kinds == expected, f"{tokens} tokens"
        # Devices look up their own words. On GPUs XLA would gather the whole table for one token;
        # on CPUs it would not.
        assert [each.kind for each in found if each.part == "embedding"] == ["all-reduce"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize(
    "mesh", ["2", "4", "8", "2x4", "4 experts", "2x4 experts", "seq=2,model=4"]
)
@pytest.mark.parametrize("rows", [1, 8])
def test_no_weight_and_no_page_is_communicated_at_the_published_shapes(config, mesh, rows):
    """The activations of all rows and data shards are the largest result."""
    largest = max(each.bytes for each in find(config, mesh, rows, rows))
    assert largest <= 4 * 2 * rows * config.text.width
