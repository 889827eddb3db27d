"""Every axis has a place, and what cannot be placed is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen.spmd import RulesFallback, with_logical_constraint
from jax.sharding import PartitionSpec

from l4jax import axes, cache, decode, sampling
from l4jax.config import MAVERICK, SCOUT
from l4jax.model import declare_parameters
from sharding import STRATEGIES, TENSOR, Layout, MeshError, make_mesh


@pytest.fixture
def layout():
    return Layout(make_mesh("2x4"), TENSOR)


def is_names(leaf) -> bool:
    return isinstance(leaf, tuple) and all(isinstance(name, str) for name in leaf)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_logical_axis_has_a_rule_and_every_rule_an_axis(strategy):
    names = {value for key, value in vars(axes).items() if key.isupper()}
    assert names == set(STRATEGIES[strategy].table)


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


def test_everything_a_step_takes_is_placed(layout):
    for names in (
        cache.name_axes(has_features=True),
        decode.DECODE_ROWS_AXES,
        sampling.SAMPLING_METADATA_AXES,
    ):
        placed = layout.place_all(names)
        assert all(hasattr(leaf, "spec") for leaf in jax.tree.leaves(placed))


def test_a_misspelt_axis_raises_and_does_not_replicate(layout):
    with pytest.raises(KeyError, match="the axis 'kv_head' is in no rule of the strategy 'tensor'"):
        layout.place(("kv_head", "width"))
    with layout.active(), pytest.raises(ValueError, match=r"kv_head"):
        jax.jit(
            lambda x: with_logical_constraint(
                x, ("kv_head", "width"), fallback=RulesFallback.RAISE_ERROR
            )
        )(jnp.zeros((8, 8)))


def test_a_strategy_cannot_invent_an_axis():
    with pytest.raises(KeyError, match="no such logical axis: kv_head"):
        TENSOR.change("other", kv_head="model")


def test_names_become_a_partition(layout):
    assert layout.spec(cache.POOL_AXES) == PartitionSpec("data", "model", None, None)
    assert layout.count(axes.KV_HEADS) == 4 and layout.count(axes.ROWS) == 2
    assert layout.count(axes.WIDTH) == 1


def test_a_local_function_sees_its_own_part_and_its_results_are_added(layout):
    def multiply(x_TF, w_DF):
        assert x_TF.shape == (2, 2) and w_DF.shape == (3, 2)
        return x_TF @ w_DF.T

    rng = np.random.default_rng(0)
    x_TF, w_DF = rng.standard_normal((4, 8)), rng.standard_normal((3, 8))
    run = layout.local(
        multiply,
        ((axes.TOKENS, axes.HIDDEN), (axes.WIDTH, axes.HIDDEN)),
        (axes.TOKENS, axes.WIDTH),
        sum_over=axes.HIDDEN,
    )
    np.testing.assert_allclose(run(x_TF, w_DF), x_TF @ w_DF.T, atol=1e-5)


def test_a_mesh_that_does_not_divide_is_refused_with_one_that_does(layout):
    layout.check(axes.KV_HEADS, 8, "kv heads")
    with pytest.raises(MeshError) as raised:
        layout.check(axes.KV_HEADS, 6, "kv heads")
    assert str(raised.value) == (
        "--mesh 2x4: 4 devices cannot share 6 kv heads; the model axis may have 1 or 2 or 3 here: "
        "data=2,model=3."
    )
