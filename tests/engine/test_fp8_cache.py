"""An fp8 KV cache has half the bytes, the checkpoint's scales, and close logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import cache, checkpoint, decode
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.safetensors import Index, write_safetensors
from l4jax.config import SCOUT, Config
from l4jax.engine.config import CapacityError, EngineConfig
from l4jax.engine.runner import Runner
from l4jax.kernels import PORTABLE, reference
from l4jax.kernels.formats import FP8
from l4jax.model import Llama4
from tests import models, weights
from tests.engine.engines import GREEDY, assert_all_free, get_pool, make_engine, run_all


def test_pages_per_gibibyte_double():
    fp8, bf16 = (cache.count_page_bytes(SCOUT.text, 128, dtype) for dtype in (FP8, jnp.bfloat16))
    assert 2 * fp8 == bf16
    runner = make_engine("scout-8-text").runner
    limits = [
        runner.allocate_kv_cache(
            EngineConfig(kv_cache_dtype=dtype, kv_cache_memory_bytes=2**20, block_size=4)
        )
        for dtype in ("auto", "fp8")
    ]
    assert limits[1].pages == 4 * limits[0].pages  # compared with float32
    pages = get_pool(runner).k[0]
    assert pages.dtype == FP8 and pages.itemsize == 1


def test_values_beyond_the_range_of_e4m3_are_clamped_and_not_nan():
    pages = jnp.zeros((1, 1, 4, 2), FP8)
    k = jnp.array([[[1000.0, -1e9]], [[0.3, 448.0]]])
    where = (jnp.zeros((1, 1), jnp.int32), jnp.zeros(2, jnp.int32), jnp.arange(2))
    stored, _ = reference.store(pages, pages, k, k, *where)
    found = stored[0, 0, :2].astype(jnp.float32)
    np.testing.assert_allclose(found, [[448, -448], [0.3125, 448]])


def compute_logits(tiny: models.Tiny, ids: np.ndarray, dtype, scales=None) -> np.ndarray:
    text, page = tiny.config.text, 4
    rows = -(-len(ids) // text.chunk)
    whole = np.arange(-(-len(ids) // page), dtype=np.int32)
    size, per = len(whole), text.chunk // page
    local = size + np.arange(3 * rows * per).reshape(rows, 3, per).transpose(1, 0, 2)
    pool = cache.make_pool(text, size + 3 * rows * per, page, dtype)
    if scales is not None:
        pool = cache.PagePool(pool.k, pool.v, *map(jnp.asarray, scales))
    at = np.arange(len(ids), dtype=np.int32)
    tables = cache.PageTables(np.tile(whole, (rows, 1)), local.astype(np.int32))
    batch = cache.Batch(ids, at, at // text.chunk, tables)
    _, logits = decode.score(tiny.params, pool, batch, model=Llama4(text, PORTABLE))
    return np.asarray(logits)


@pytest.mark.parametrize("name", ["scout-8-text", "maverick-32-text"])
def test_scales_change_rounding_only(name):
    """In a float32 pool any scales give the same logits; in fp8 a power of two gives the same bits
    within e4m3's range."""
    tiny, golden = models.load_golden(name)
    layers = tiny.config.text.layers
    plain = compute_logits(tiny, golden.ids, jnp.float32)
    odd = np.linspace(0.3, 2.7, 2 * layers, dtype=np.float32).reshape(2, layers)
    scaled = compute_logits(tiny, golden.ids, jnp.float32, odd)
    np.testing.assert_allclose(scaled, plain, atol=1e-4 * np.abs(plain).max())
    one, half = (
        compute_logits(tiny, golden.ids, FP8, np.full((2, layers), scale, np.float32))
        for scale in (1.0, 0.5)
    )
    error = np.linalg.norm(one - plain) / np.linalg.norm(plain)
    # e4m3 keeps 3 bits: 2 ** -4 at most for each key and value, less in their sums.
    assert 1e-4 < error < 0.3
    assert np.linalg.norm(half - one) / np.linalg.norm(one) < 0.1


def write_with_scales(folder, scales: dict[str, float]) -> Config:
    raw = weights.tiny_config("scout")
    weights.write_checkpoint(folder, raw, 0)
    index = Index.open(folder)
    tensors = {name: np.array(index.view(name)) for name in index.specs}
    tensors |= {name: np.array(value, np.float32) for name, value in scales.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return checkpoint.parse_config(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("form", ["self_attn.{}_scale", "self_attn.{}_proj.{}_scale"])
@pytest.mark.parametrize("prefix", ["language_model.", ""])
def test_scales_are_read_from_the_checkpoint(tmp_path, form, prefix):
    layers = weights.tiny_config("scout")["text_config"]["num_hidden_layers"]
    scales = {
        f"{prefix}model.layers.{i}." + form.format(kind, kind): 0.5 + i + 10 * (kind == "v")
        for i in range(layers)
        for kind in "kv"
    }
    config = write_with_scales(tmp_path, scales)
    runner = Runner(config, "2x4", "float32")
    runner.load(tmp_path, progress=False)
    runner.allocate_kv_cache(EngineConfig(max_model_len=64, kv_cache_dtype="fp8"))
    np.testing.assert_array_equal(get_pool(runner).k_scale, 0.5 + np.arange(layers))
    np.testing.assert_array_equal(get_pool(runner).v_scale, 10.5 + np.arange(layers))
    runner.allocate_kv_cache(EngineConfig(max_model_len=64))
    assert get_pool(runner).k_scale is None


def test_scales_of_some_layers_only_are_refused(tmp_path):
    config = write_with_scales(tmp_path, {"language_model.model.layers.1.self_attn.k_scale": 2.0})
    with pytest.raises(CheckpointError, match="lacks k_scale of layer 0"):
        checkpoint.load_kv_scales(tmp_path, config)


@pytest.mark.parametrize(
    "mesh", [pytest.param("1", marks=pytest.mark.slow), "2x4", "data=2,seq=2,model=2"]
)
def test_an_engine_runs_on_an_fp8_cache_and_frees_all_pages(mesh):
    golden = weights.read_golden("scout-8-text")
    engine = make_engine("scout-8-text", mesh, kv_cache_dtype="fp8", block_size=2)
    for _ in range(3):
        engine.add(golden.ids.tolist(), GREEDY.replace(max_tokens=20))
    found = run_all(engine)
    assert found[0] == found[1] == found[2] and len(found[0]) == 20
    assert_all_free(engine)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(engine.runner.pool)} == {
        "float8_e4m3fn",
        "float32",
    }


def test_another_dtype_is_refused():
    with pytest.raises(CapacityError, match="kv_cache_dtype is 'int8': it is auto or fp8"):
        EngineConfig(kv_cache_dtype="int8")
