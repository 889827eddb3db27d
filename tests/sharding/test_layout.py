"""Arrays are placed by the names of their axes, and an axis without a rule is refused."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding import DATA, MODEL, Layout, MeshError, Rules, make_mesh

RULES = Rules.replicate("replicated", ("tokens", "heads", "inside", "width")).change(
    "cut", {"tokens": DATA, "heads": MODEL, "inside": MODEL}
)


@pytest.fixture
def layout():
    return Layout(make_mesh("2x4"), RULES)


def test_a_misspelt_axis_raises_and_does_not_replicate(layout):
    with pytest.raises(KeyError, match="the axis 'head' is in no rule of the strategy 'cut'"):
        layout.place(("head", "width"))


def test_a_strategy_cannot_invent_an_axis():
    with pytest.raises(KeyError, match="no such logical axis: head"):
        RULES.change("other", {"head": MODEL})


def test_names_become_a_partition(layout):
    assert layout.spec(("tokens", "heads", "width")) == PartitionSpec("data", "model", None)
    assert layout.count("heads") == 4 and layout.count("tokens") == 2
    assert layout.count("width") == 1


def test_a_tree_of_names_becomes_a_tree_of_shardings(layout):
    found = layout.place_all({"a": ("tokens",), "b": [("heads", "width")]})
    assert found == {"a": layout.place(("tokens",)), "b": [layout.place(("heads", "width"))]}
    assert len(jax.tree.leaves(found)) == 2


def test_a_local_function_sees_its_own_shard_and_its_results_are_summed(layout):
    def multiply(x_TF, w_DF):
        assert x_TF.shape == (2, 2) and w_DF.shape == (3, 2)
        return x_TF @ w_DF.T

    rng = np.random.default_rng(0)
    x_TF, w_DF = rng.standard_normal((4, 8)), rng.standard_normal((3, 8))
    run = layout.local(
        multiply,
        (("tokens", "inside"), ("width", "inside")),
        ("tokens", "width"),
        sum_over="inside",
    )
    np.testing.assert_allclose(run(x_TF, w_DF), x_TF @ w_DF.T, atol=1e-5)


def test_a_mesh_that_does_not_divide_is_refused_with_one_that_does(layout):
    layout.check("heads", 8, "kv heads")
    with pytest.raises(MeshError) as raised:
        layout.check("heads", 6, "kv heads")
    assert str(raised.value) == (
        "--mesh 2x4: 4 devices cannot share 6 kv heads; the model axis may have 1 or 2 or 3 here: "
        "data=2,model=3."
    )
