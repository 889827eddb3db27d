"""Every submodule equals transformers' on random data; and settings outside the goldens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import checkpoint
from l4jax.cache import make_pool
from l4jax.kernels import PORTABLE, REFERENCE
from l4jax.model.attention import Attention, Positions
from l4jax.model.layers import GatedMLP, RMSNorm
from l4jax.model.moe import MixtureOfExperts
from l4jax.model.transformer import Layer
from l4jax.model.vision import Adapter, VisionLayer
from tests import models, weights
from tests.reference import oracle
from tests.test_model import assert_close

KINDS = ["scout", "maverick"]
PAGE = 4


def make_cases(kind: weights.Kind, chunk: int) -> tuple[models.Tiny, dict[str, oracle.Case]]:
    raw = weights.tiny_config(kind, attention_chunk_size=chunk)
    ids = np.concatenate([weights.random_ids(3 * chunk, 3), weights.image_ids(1, 2)])
    cases = oracle.submodule_cases(oracle.build(raw, 0), ids, weights.random_pixels(3, 4))
    return models.load(raw), cases


@pytest.fixture(scope="module", params=KINDS)
def cases(request):
    return make_cases(request.param, 8)


def place(tokens: int, chunk: int, is_local: bool) -> Positions:
    """Make positions 0 .. of a request on consecutive pages: local layers have a row per chunk."""
    at_T = np.arange(tokens, dtype=np.int32)
    pages = np.arange(-(-tokens // PAGE), dtype=np.int32)
    if not is_local:
        return Positions(at_T, at_T, np.zeros_like(at_T), pages[None])  # type: ignore[arg-type]
    rows = -(-tokens // chunk)
    table_RB = np.arange(rows * chunk // PAGE, dtype=np.int32).reshape(rows, -1)
    return Positions(at_T, at_T % chunk, at_T // chunk, table_RB)  # type: ignore[arg-type]


def run(module, params, *arguments) -> Any:
    return module.apply({"params": params}, *arguments)


@pytest.mark.parametrize(("name", "layer"), [("attention_local", 0), ("attention_global", 3)])
def test_attention_equals_the_reference(cases, name, layer):
    tiny, found = cases
    text, case = tiny.config.text, found[name]
    tokens = len(case.input)
    positions = place(tokens, text.chunk, is_local=layer == 0)
    pool = make_pool(text, 64, PAGE, jnp.float32)
    module = Attention(text, text.is_nope(layer), PORTABLE)
    params = tiny.params["text"][f"layer_{layer}"]["attention"]
    y_TD, _, _ = run(module, params, case.input, None, pool.k[0], pool.v[0], positions)
    assert_close(np.asarray(y_TD), case.output)


def test_layer_equals_the_reference(cases):
    tiny, found = cases
    text, case = tiny.config.text, found["layer"]
    pool = make_pool(text, 64, PAGE, jnp.float32)
    positions = place(len(case.input), text.chunk, is_local=True)
    params = tiny.params["text"]["layer_0"]
    layer = Layer(text, text.is_nope(0), text.is_moe(0), PORTABLE)
    y_TD, _, _ = run(layer, params, case.input, pool.k[0], pool.v[0], positions)
    assert_close(np.asarray(y_TD), case.output)


def test_mixture_of_experts_equals_the_reference(cases):
    tiny, found = cases
    text, case = tiny.config.text, found["moe"]
    layer = max(i for i in range(text.layers) if text.is_moe(i))
    params = tiny.params["text"][f"layer_{layer}"]["feed_forward"]
    y_TD = run(MixtureOfExperts(text, PORTABLE), params, case.input, None)
    assert_close(np.asarray(y_TD), case.output)


def test_dense_mlp_equals_the_reference():
    tiny, found = make_cases("maverick", 8)
    case = found["dense"]
    params = tiny.params["text"]["layer_0"]["feed_forward"]
    text = tiny.config.text
    y_TD = run(GatedMLP(text.width, text.dense_width, PORTABLE), params, case.input, None)
    assert_close(np.asarray(y_TD), case.output)


def test_norm_equals_the_reference(cases):
    tiny, found = cases
    case = found["norm"]
    text = tiny.config.text
    norm = run(RMSNorm(text.width, text.norm_eps), tiny.params["text"]["norm"])
    y_TD = PORTABLE.normalize(case.input, norm)
    assert_close(np.asarray(y_TD), case.output)


def test_vision_layer_equals_the_reference(cases):
    tiny, found = cases
    case = found["vision_layer"]
    module = VisionLayer(tiny.config.vision, REFERENCE)
    y_INW = run(module, tiny.params["vision"]["layer_0"], case.input)
    assert_close(np.asarray(y_INW), case.output)


def test_adapter_equals_the_reference(cases):
    tiny, found = cases
    case = found["vision_adapter"]
    y_INA = run(Adapter(tiny.config.vision), tiny.params["vision"]["adapter"], case.input)
    assert_close(np.asarray(y_INA), case.output)


# Each pair of values of two switches.
@pytest.mark.parametrize(
    ("moe_step", "has_qk_norm", "has_scaling"),
    [(1, True, True), (1, False, False), (2, True, False), (2, False, True)],
)
def test_every_pair_of_switches_equals_the_reference(moe_step, has_qk_norm, has_scaling):
    scaling = weights.tiny_config("scout")["text_config"]["rope_scaling"] if has_scaling else None
    raw = weights.tiny_config(
        "scout",
        interleave_moe_layer_step=moe_step,
        use_qk_norm=has_qk_norm,
        rope_scaling=scaling,
        attention_chunk_size=8,
    )
    ids = weights.random_ids(29, 5)
    logits = models.run_in_pieces(models.load(raw), ids, [7, 8, 17])
    assert_close(logits, oracle.logits(oracle.build(raw, 0), ids))


def test_without_temperature_tuning_equals_the_reference():
    raw = weights.tiny_config("scout", attn_temperature_tuning=False, attention_chunk_size=8)
    ids = weights.random_ids(29, 6)
    logits = models.run_in_pieces(models.load(raw), ids, [])
    assert_close(logits, oracle.logits(oracle.build(raw, 0), ids))
    tuned = checkpoint.parse_config(raw).replace_text(has_temperature_tuning=True)
    other = models.run_in_pieces(models.load(raw)._replace(config=tuned), ids, [])
    assert np.abs(other - logits).max() > 0.1  # the setting matters here
