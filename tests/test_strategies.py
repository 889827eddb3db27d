"""Every logical axis of the model has a rule, and the published models are divided evenly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from l4jax import axes, cache, decode, sampling
from l4jax.config import MAVERICK, SCOUT
from l4jax.model import declare_parameters
from l4jax.model.layers import constrain
from l4jax.strategies import STRATEGIES, TENSOR, activate
from sharding import Layout, make_mesh


@pytest.fixture
def layout():
    return Layout(make_mesh("2x4"), TENSOR)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_logical_axis_has_a_rule_and_every_rule_an_axis(strategy):
    names = {value for key, value in vars(axes).items() if key.isupper() and key != "ALL"}
    assert names == set(axes.ALL) == set(STRATEGIES[strategy].table)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_every_array_of_the_published_models_is_placed_and_cut_evenly(config, strategy):
    layout = Layout(make_mesh("8"), STRATEGIES[strategy])
    shapes, names = declare_parameters(config, jnp.bfloat16)
    places = layout.place_all(names)
    parts = jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), shapes, places)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    part = sum(
        int(np.prod(shape))
        for shape in jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, tuple))
    )
    # All but norms, routers and a little of the vision tower is an eighth.
    assert part / total < 1.01 / 8


def test_every_input_of_a_step_is_placed(layout):
    for names in (
        cache.name_axes(has_features=True),
        decode.DECODE_ROWS_AXES,
        sampling.SAMPLING_METADATA_AXES,
    ):
        placed = layout.place_all(names)
        assert all(hasattr(leaf, "spec") for leaf in jax.tree.leaves(placed))


def test_a_misspelt_axis_in_the_model_raises_and_does_not_replicate(layout):
    with activate(layout), pytest.raises(ValueError, match=r"kv_head"):
        jax.jit(lambda x: constrain(x, "kv_head", "width"))(jnp.zeros((8, 8)))


def test_the_page_pool_is_divided_over_both_mesh_axes(layout):
    assert layout.spec(cache.POOL_AXES) == PartitionSpec("data", "model", None, None)
    assert layout.count(axes.KV_HEADS) == 4 and layout.count(axes.ROWS) == 2
    assert layout.count(axes.WIDTH) == 1
