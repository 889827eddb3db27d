"""What transformers itself saves is loaded with every tensor equal."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from l4jax import checkpoint
from l4jax.checkpoint.parameters import flatten
from l4jax.config import Config
from tests import weights
from tests.checkpoint.published import arrange
from tests.reference import oracle


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_what_transformers_saves_is_loaded(
    kind: weights.Kind, sharded: bool, tmp_path: Path
) -> None:
    model = oracle.build(weights.tiny_config(kind), 2)
    oracle.save(model, tmp_path, sharded=sharded)
    config = Config.from_folder(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = arrange(tensors, config)
    loaded = checkpoint.load(
        tmp_path,
        config,
        np.float32,
        lambda _: SingleDeviceSharding(jax.devices()[0]),
        progress=False,
    )
    found = flatten(loaded)
    assert set(found) == set(expected)
    for path, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), expected[path], err_msg=path)
