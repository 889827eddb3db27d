"""On an NVIDIA GPU: the same tokens as the reference, in float32, and an answer in bfloat16."""

import jax
import pytest

from tests import weights
from tests.engine.engines import GREEDY, assert_all_free, find_tiles, make_engine, run_all

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", weights.GOLDENS)
def test_greedy_tokens_equal_the_reference_on_a_gpu(name):
    golden = weights.read_golden(name)
    engine = make_engine(name)
    (device,) = engine.runner.pool.k[0].devices()
    assert device.platform == "gpu" and device in jax.devices("gpu")
    for _ in range(3):
        engine.add(golden.ids.tolist(), GREEDY, find_tiles(golden))
    found = run_all(engine)
    assert all(tokens == golden.greedy_tokens.tolist() for tokens in found.values())
    assert_all_free(engine)
