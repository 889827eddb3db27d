"""Laws of training: it computes as inference does, reduces the loss, and resumes exactly."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from l4jax import cache, checkpoint, decode
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.safetensors import INDEX
from l4jax.kernels import PORTABLE
from l4jax.kernels.formats import Quantized
from l4jax.model import Llama4, VisionTower, declare_parameters
from l4jax.text.image import ImageProcessor
from l4jax.train import bundle, saved_state
from l4jax.train.batches import make_batch
from l4jax.train.charts import draw
from l4jax.train.kernels import make_empty_pool, make_training_kernels
from l4jax.train.metrics import read_lines
from l4jax.train.splits import assign_split
from l4jax.train.train_step import (
    Hyperparameters,
    compute_load_balancing,
    compute_loss,
    initialize,
    make_model_batch,
    make_train_step,
)
from l4jax.train.trainer import load_saved, train
from scripts import train_tiny
from tests.train import tiny

LEVELS = ImageProcessor.from_folder(tiny.make_tokenizer_folder()).levels_C256
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def read_losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["norm"]) for line in read_lines(folder)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Ten uninterrupted steps."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny.make_training_config(10), folder, quiet=True)
    return folder


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(whole_run, tmp_path):
    """SIGKILL between two saved states; later losses and the weights are equal bit for bit."""
    training = f"tiny.make_training_config(10, folder=Path({str(tiny.make_tokenizer_folder())!r}))"
    code = (
        "from pathlib import Path; from tests.train import tiny;"
        "from l4jax.train.trainer import train;"
        f"train({training}, Path({str(tmp_path)!r}), quiet=True)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment)
    deadline = time.monotonic() + 240
    while len(read_lines(tmp_path)) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    lines = len(read_lines(tmp_path))
    assert 6 <= lines < 10 and (
        saved_state.list_saved(tmp_path)[-1].name in ("step-00000004", "step-00000008")
    )
    train(tiny.make_training_config(10), tmp_path, quiet=True)
    assert read_losses(tmp_path) == read_losses(whole_run)
    assert [step for step, *_ in read_losses(tmp_path)] == list(range(1, 11))
    training = tiny.make_training_config(10)
    ours, wanted = load_saved(training, tmp_path), load_saved(training, whole_run)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


def test_a_saved_state_takes_five_bytes_per_weight_in_files_below_16_mib(whole_run):
    state = load_saved(tiny.make_training_config(10), whole_run)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    files = list(saved_state.list_saved(whole_run)[-1].iterdir())
    assert sum(file.stat().st_size for file in files) < 5.6 * weights + 40_000  # headers, scales
    assert all(file.stat().st_size < 16 * 2**20 for file in files)
    shapes = jax.eval_shape(lambda: initialize(bundle.CONFIG, Hyperparameters(steps=1), 0))
    whole = saved_state._flatten(jax.eval_shape(saved_state.quantize_state, shapes))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole)]
    assert sum(sizes) < 56 * 2**20 and max(sizes) < saved_state.SHARD_BYTES


def test_another_configuration_is_refused_by_its_difference(whole_run):
    training = tiny.make_training_config(10)
    other = dataclasses.replace(training, hparams=dataclasses.replace(training.hparams, rate=1.0))
    with pytest.raises(saved_state.StateError, match=r"hparams.rate = 0.003 and this run has 1.0"):
        train(other, whole_run, quiet=True)


def test_a_state_saved_with_the_names_of_0_1_0_is_loaded(whole_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole_run, copy)
    (saved,) = saved_state.list_saved(copy)
    text = (saved / INDEX).read_text()
    assert '"data.seed"' in text and '"hparams.rate"' in text
    (saved / INDEX).write_text(
        text.replace('"data.', '"recipe.').replace('"hparams.', '"teaching.')
    )
    assert int(load_saved(tiny.make_training_config(10), copy).step) == 10


def test_a_folder_without_a_saved_state_is_refused(tmp_path):
    with pytest.raises(saved_state.StateError, match="holds no saved state: train first"):
        load_saved(tiny.make_training_config(10), tmp_path)


def test_a_run_writes_curves_and_a_line_of_metrics_per_step(whole_run):
    assert "<polyline" in (whole_run / "curves.svg").read_text()
    lines = read_lines(whole_run)
    assert {"loss", "words", "right", "balance", "rate", "load_LE"} <= set(lines[0])
    saved = [line["step"] for line in lines if "validation_words" in line]
    assert saved == [4, 8, 10]


@functools.cache
def make_state(seed: int = 0, **changes):
    config = tiny.CONFIG.replace_text(**changes)
    training = dataclasses.replace(tiny.make_training_config(100), model=config)
    return training, jax.jit(lambda: initialize(config, training.hparams, seed))()


def find_batch_with_image(training):
    """Find a batch that contains an image."""
    batches = (make_batch(training.data, step) for step in range(100))
    return next(batch for batch in batches if (batch.feature_T >= 0).any())


def test_every_weight_gets_a_gradient():
    """Vision, routers and all experts, from a batch with an image."""
    training, state = make_state()
    packed = find_batch_with_image(training)
    find = jax.grad(lambda p: compute_loss(p, packed, training.model, training.hparams, LEVELS)[0])
    for path, gradient in saved_state._flatten(jax.jit(find)(state.params)).items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


@pytest.mark.slow
def test_the_loss_falls():
    """Forty steps on one batch with images: every token can be memorized."""
    training, state = make_state()
    hparams = dataclasses.replace(training.hparams, steps=1000)
    train_step = jax.jit(make_train_step(training.model, hparams, LEVELS))
    packed, found = find_batch_with_image(training), []
    for _ in range(40):
        state, metrics = train_step(state, packed)
        found.append(float(metrics["words"]))
    assert found[0] > 6 and found[-1] < 0.2 * found[0], found


def test_training_and_serving_compute_the_same_logits():
    """Compare the logits of packed documents with those of the engine's kernels on a page pool."""
    training, state = make_state(layers=4, nope_interval=4)
    text, vision = training.model.text, training.model.vision
    assert vision is not None
    packed = find_batch_with_image(training)
    pixels = np.stack([LEVELS[c][packed.tiles_ICYX[:, c]] for c in range(3)], axis=1)
    tower = VisionTower(vision, text.width)
    features = jax.jit(tower.apply)({"params": state.params["vision"]}, pixels)
    model = Llama4(text, make_training_kernels(text.chunk))
    variables = {"params": state.params["text"]}

    @jax.jit
    def run(packed, features):
        features_MD = features.reshape(-1, text.width)
        x_TD, _ = model.apply(
            variables, make_model_batch(packed, text), make_empty_pool(text), features_MD
        )
        return model.apply(variables, x_TD, method="compute_logits")

    found_TV = np.asarray(run(packed, features))
    starts = np.flatnonzero(packed.position_T == 0)
    spans = [slice(start, start + _count(packed.position_T[start:])) for start in starts]
    longest = max(spans, key=lambda span: span.stop - span.start)
    assert longest.stop - longest.start > 2 * text.chunk
    pictured = next(span for span in spans if (packed.feature_T[span] >= 0).any())
    for span in (spans[-1], longest, pictured):
        wanted_TV = _serve(state.params, text, packed, features, span)
        scale = np.abs(wanted_TV).max()
        np.testing.assert_allclose(found_TV[span] / scale, wanted_TV / scale, atol=2e-5)


def _count(position_T: np.ndarray) -> int:
    is_next_T = np.append(position_T[1:], -1) == np.arange(1, len(position_T) + 1)
    return int(np.argmin(is_next_T)) + 1


def _serve(params, text, packed, features, span: slice) -> np.ndarray:
    """Compute the logits of one document by `decode.score`, each chunk a row with its own pages."""
    count, page = span.stop - span.start, 16
    rows = -(-count // text.chunk)
    at_T = np.arange(count, dtype=np.int32)
    whole = np.arange(rows * text.chunk // page, dtype=np.int32)
    local = len(whole) + np.arange(3 * len(whole), dtype=np.int32).reshape(3, rows, -1)
    tables = cache.PageTables(np.tile(whole, (rows, 1)), local)
    pool = cache.make_pool(text, 4 * len(whole), page, jnp.float32)
    batch = cache.Batch(
        packed.token_T[span], at_T, at_T // text.chunk, tables, packed.feature_T[span]
    )
    model = Llama4(text, PORTABLE)
    return np.asarray(decode.score(params, pool, batch, features, model=model)[1])


def test_documents_in_a_batch_do_not_attend_to_each_other():
    """A document's logits do not change, bit for bit, with the tokens of all other documents."""
    training, state = make_state()
    packed = make_batch(training.data, 60)
    start = int(np.flatnonzero(packed.position_T == 0)[2])
    span = slice(start, start + _count(packed.position_T[start:]))
    token_T = (packed.token_T + 1) % 256
    token_T[span] = packed.token_T[span]
    others = dataclasses.replace(packed, token_T=token_T)
    text = training.model.text
    model = Llama4(text, make_training_kernels(text.chunk))

    @jax.jit
    def run(packed):
        variables = {"params": state.params["text"]}
        return model.apply(variables, make_model_batch(packed, text), make_empty_pool(text), None)[
            0
        ]

    first, second = np.asarray(run(packed)), np.asarray(run(others))
    np.testing.assert_array_equal(first[span], second[span])
    assert not np.array_equal(first, second)


def make_sharded_config():
    """The tiny configuration with enough heads for a mesh of eight."""
    config = tiny.CONFIG.replace_text(kv_heads=8)
    assert config.vision is not None
    vision = dataclasses.replace(config.vision, heads=8)
    return dataclasses.replace(
        tiny.make_training_config(4), model=dataclasses.replace(config, vision=vision)
    )


@pytest.mark.slow
def test_sharded_training_equals_training_on_one_device(tmp_path):
    """Losses, gradient norms and weights, up to float32 rounding."""
    training, one, many = make_sharded_config(), tmp_path / "one", tmp_path / "many"
    wanted = train(training, one, quiet=True)
    state = train(training, many, mesh="data=2,model=4", quiet=True)
    np.testing.assert_allclose(np.array(read_losses(many)), np.array(read_losses(one)), rtol=2e-4)
    qkv = state.params["text"]["layer_0"]["attention"]["qkv"]
    assert qkv.sharding.spec[0] == "model"
    moment = jax.tree.leaves(
        jax.tree.map(
            lambda leaf: leaf.sharding.spec if leaf.shape == qkv.shape else None, state.moments
        )
    )
    assert len(moment) == 2 * 2 and all(spec[0] == "model" for spec in moment)
    ours = saved_state._flatten(state.params)
    for path, leaf in saved_state._flatten(wanted.params).items():
        # Adam may divide by pure rounding error, and a few weights then move by a full step.
        assert np.mean(np.abs(np.asarray(ours[path]) - np.asarray(leaf)) > 1e-4) < 0.02, path


def test_the_load_balancing_loss_equals_its_formula():
    rng = np.random.default_rng(0)
    score_TE = rng.standard_normal((40, 4)).astype(np.float32)
    is_real_T = rng.random(40) < 0.8
    real = score_TE[is_real_T].astype(np.float64)
    chance = np.exp(real) / np.exp(real).sum(1, keepdims=True)
    load = np.bincount(real.argmax(1), minlength=4)
    wanted = 4 * (load / len(real) * chance.mean(0)).sum()
    loss, found = compute_load_balancing(jnp.asarray(score_TE), jnp.asarray(is_real_T))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_array_equal(found, load)
    even = jnp.tile(8 * jnp.eye(4), (5, 1))
    np.testing.assert_allclose(compute_load_balancing(even, jnp.ones(20, bool))[0], 1, rtol=1e-6)
    one = jnp.tile(jnp.array([8.0, 0, 0, 0]), (20, 1))
    assert compute_load_balancing(one, jnp.ones(20, bool))[0] > 3.9


def test_load_balancing_reaches_every_router():
    training, state = make_state()
    packed = make_batch(training.data, 3)

    def find(weight: float):
        hparams = dataclasses.replace(training.hparams, balance=weight)
        grad = jax.grad(lambda p: compute_loss(p, packed, training.model, hparams, LEVELS)[0])
        return jax.jit(grad)(state.params)["text"]

    without, with_it = find(0.0), find(1.0)
    for layer in ("layer_0", "layer_1"):
        routers = [grads[layer]["feed_forward"]["router"] for grads in (without, with_it)]
        assert np.abs(routers[0]).max() > 0  # through the gate, as in serving
        assert np.abs(routers[1] - routers[0]).max() > 1e-4


def test_serving_keeps_no_router_scores():
    training, state = make_state()
    text = training.model.text
    packed = make_batch(training.data, 3)
    model = Llama4(text, make_training_kernels(text.chunk))
    variables = {"params": state.params["text"]}
    run = functools.partial(
        model.apply, variables, make_model_batch(packed, text), make_empty_pool(text)
    )
    plain = jax.make_jaxpr(run)()
    kept = jax.make_jaxpr(functools.partial(run, mutable=["intermediates"]))()
    assert len(plain.jaxpr.outvars) + text.layers == len(kept.jaxpr.outvars)


def test_the_saved_state_is_rounded_once():
    _, state = make_state()
    state = dataclasses.replace(
        state,
        moments=jax.tree.map(lambda leaf: leaf + jnp.asarray(0.001, leaf.dtype), state.moments),
    )
    saved = saved_state.quantize_state(state)
    first = [x for x in jax.tree.leaves(saved, is_leaf=_is_quantized) if _is_quantized(x)]
    matrices = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    assert len(first) == len(matrices)
    again = saved_state.quantize_state(saved_state.dequantize_state(saved))
    for ours, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))
    for ours, wanted in zip(
        jax.tree.leaves(saved_state.dequantize_state(saved).params),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, wanted, rtol=2**-8)


def _is_quantized(leaf) -> bool:
    return isinstance(leaf, Quantized)


@pytest.mark.slow
def test_bfloat16_changes_losses_and_gradients_little_and_keeps_float32_weights():
    """From weights that bfloat16 can represent.

    Rounded weights are another model, with gradients up to an eighth smaller or larger.
    """
    training, _ = make_state()
    packed, ratios = find_batch_with_image(training), []
    step_bf16, step_f32 = (
        jax.jit(
            make_train_step(
                training.model, dataclasses.replace(training.hparams, dtype=dtype), LEVELS
            )
        )
        for dtype in ("bfloat16", "float32")
    )
    for seed in range(3):
        _, state = make_state(seed)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        state = dataclasses.replace(state, params=params)
        (now, metrics), (_, wide_metrics) = step_bf16(state, packed), step_f32(state, packed)
        assert {leaf.dtype for leaf in jax.tree.leaves(now.params)} == {jnp.dtype("float32")}
        assert metrics["loss"] != wide_metrics["loss"]
        np.testing.assert_allclose(metrics["loss"], wide_metrics["loss"], rtol=0.01)
        ratios.append(float(metrics["norm"]) / float(wide_metrics["norm"]))
    np.testing.assert_allclose(ratios, 1, rtol=0.05)
    np.testing.assert_allclose(np.median(ratios), 1, rtol=0.01)


def test_initial_patch_weights_map_a_white_background_to_zero():
    _, state = make_state()
    patch_WU = state.params["vision"]["patch"]
    assert np.abs(patch_WU.sum(axis=-1)).max() < 1e-4 < np.abs(patch_WU).mean()


def test_initial_weights_keep_the_size_of_the_signal():
    training, state = make_state()
    packed = make_batch(training.data, 60)
    _, metrics = jax.jit(
        lambda p: compute_loss(p, packed, training.model, training.hparams, LEVELS)
    )(state.params)
    assert abs(float(metrics["words"]) - np.log(training.model.text.vocab)) < 1.0
    assert (np.asarray(metrics["load_LE"]).sum(1) == (packed.position_T >= 0).sum()).all()


def test_the_bundled_model_fits_in_the_wheel_and_on_a_mesh_of_eight():
    assert sum(file.stat().st_size for file in checkpoint.find_bundled().iterdir()) <= 24e6
    shapes, _ = declare_parameters(bundle.CONFIG, jnp.bfloat16)
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert weights < (checkpoint.BUNDLED / "model.safetensors").stat().st_size < 1.01 * weights
    text, vision = bundle.CONFIG.text, bundle.CONFIG.vision
    assert vision is not None
    sizes = (text.kv_heads, text.vocab, text.expert_width, vision.heads, vision.adapter_width)
    assert all(size % 8 == 0 for size in sizes)
    assert 8 <= text.layers <= 12 and text.experts == 4 and 128 <= text.chunk <= 512


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    training, state = make_state()
    bundle.export(folder, training.model, state.params, tiny.make_tokenizer_folder())
    return folder


def test_an_exported_model_has_the_trained_weights(exported):
    config = checkpoint.load_config(exported)
    _, state = make_state()
    loaded = checkpoint.load(exported, config, jnp.float32, lambda _: HERE, progress=False)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    jax.tree.map(lambda ours, wanted: np.testing.assert_array_equal(ours, wanted), loaded, rounded)
    raw = json.loads((exported / "config.json").read_text())
    assert raw["architectures"] == ["Llama4ForConditionalGeneration"]
    assert len(config.eos_ids) == 3 and config.patch_id is not None


def test_an_exported_model_comes_with_a_chart_of_the_test_split(exported):
    chart = bundle.make_sample()
    assert assign_split(chart.key) == "test"
    with Image.open(exported / checkpoint.SAMPLE.name) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(draw(chart).image))


@pytest.mark.slow
def test_the_command_stops_at_its_time_limit_resumes_and_exports(tmp_path, monkeypatch, capsys):
    run, folder = tmp_path / "run", tmp_path / "model"
    training = tiny.make_training_config(8)
    monkeypatch.setattr(train_tiny, "make_training_config", lambda steps, **rest: training)
    monkeypatch.setattr(train_tiny, "enable_compilation_cache", lambda folder: None)

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train_tiny", "--folder", str(run), *words])
        train_tiny.main()
        return capsys.readouterr().out

    assert "step 4 of 8" in call("--minutes", "0.0001", "--workers", "0")
    assert [line["step"] for line in read_lines(run)] == [1, 2, 3, 4]
    output = call("--workers", "1")
    assert "step 8 of 8" in output and "step 4 of 8" not in output
    assert "step 8, " in call("--export", str(folder))
    assert checkpoint.load_config(folder).text == tiny.CONFIG.text


def test_a_damaged_saved_state_is_refused(whole_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole_run, copy)
    (found,) = saved_state.list_saved(copy)
    index = json.loads((found / INDEX).read_text())
    shard = found / sorted(set(index["weight_map"].values()))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        load_saved(tiny.make_training_config(10), copy)
