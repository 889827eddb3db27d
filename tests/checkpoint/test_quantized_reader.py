"""Quantized checkpoints from disk: bit for bit what an independent decoder finds, on any mesh."""

import json
import re
import tracemalloc
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from l4jax import checkpoint
from l4jax.checkpoint import parameters
from l4jax.checkpoint.errors import CheckpointError
from l4jax.checkpoint.parameters import flatten, unflatten
from l4jax.checkpoint.safetensors import Index, write_safetensors
from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.runner import Runner
from l4jax.kernels import formats
from l4jax.kernels.formats import Quantized, dequantize
from tests import models, quantized, weights
from tests.checkpoint.published import arrange
from tests.engine.engines import GREEDY, run_all

# Wide enough that eight devices cut no group of 16 columns.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "intermediate_size_mlp": 128}
FORMS = get_args(quantized.Form)
# What is computed in few bits; nvfp4 becomes the model's own dtype while it is read.
WIDE = ("nvfp4", "modelopt-nvfp4")
NARROW = {form: {"float8_e4m3fn"} for form in FORMS} | {"w4a16": {"int4"}}
NARROW |= {form: set() for form in WIDE}
BFLOAT16 = ("fp8-dynamic", "maverick-fp8", "w4a16")  # are the scales of these


def place(_names):
    return SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module", params=FORMS)
def stored(request, tmp_path_factory):
    """(form, folder, config, the parameters that an independent decoding gives)."""
    form = request.param
    folder = tmp_path_factory.mktemp(form)
    raw = weights.tiny_config(
        "maverick" if form == "maverick-fp8" else "scout", attention_chunk_size=8, **WIDTHS
    )
    quantized.write_checkpoint(folder, raw, 0, form, shards=2, group_size=16)
    config = checkpoint.load_config(folder)
    index = Index.open(folder)
    tensors = {name: np.array(index.view(name)) for name in index.specs}
    return form, folder, config, arrange(quantized.decode_tensors(tensors, form), config)


def load(folder, config, dtype="float32"):
    return checkpoint.load(folder, config, dtype, place, progress=False)


def test_what_is_loaded_is_bit_for_bit_what_the_files_mean(stored):
    form, folder, config, wanted = stored
    found = flatten(load(folder, config))
    assert set(found) == set(wanted)
    for path, weight in found.items():
        dense = np.asarray(dequantize(weight, jnp.float32))
        np.testing.assert_array_equal(dense, wanted[path], err_msg=path)
    narrow = {path for path, weight in found.items() if isinstance(weight, Quantized)}
    kinds = {found[path].data.dtype.name for path in narrow}
    assert kinds == NARROW[form]
    has_shared = any("/shared/" in path for path in narrow)
    assert has_shared == (form not in ("maverick-fp8", *WIDE))
    assert any("/attention/" in path for path in narrow) == (form == "modelopt-fp8")
    assert not any("router" in path or "norm" in path for path in narrow)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["w4a16", *WIDE])
def test_host_memory_holds_no_more_than_it_decodes_at_a_time(form, tmp_path, monkeypatch):
    """Beside two slices as they will be on the devices, and two that jax lets go of a call later:
    decoded at once, a slice would take five more."""
    raw = weights.text_only(
        weights.tiny_config("scout", intermediate_size=2048, num_hidden_layers=3, hidden_size=128)
    )
    quantized.write_checkpoint(tmp_path, raw, 0, form)
    config = checkpoint.load_config(tmp_path)
    monkeypatch.setattr(parameters, "DECODED_VALUES", 2**14)
    load(tmp_path, config, "bfloat16")  # what is compiled and imported once does not count
    found, peaks = {}, []
    for _ in range(3):  # now and then jax lets go of a slice later still; of what we hold, never
        tracemalloc.start()
        found = flatten(load(tmp_path, config, "bfloat16"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    data = [weight.data if isinstance(weight, Quantized) else weight for weight in found.values()]
    largest = max(array.nbytes for array in data)
    assert largest > 20 * 2**14
    assert min(peaks) < 4.5 * largest + 40 * 2**14


@pytest.mark.parametrize("mesh", ["8", "2x4"])
def test_each_device_holds_its_part_of_data_and_scales(stored, mesh):
    _, folder, config, wanted = stored
    runner = Runner(config, mesh, "float32")
    runner.load(folder, progress=False)
    parts = 8 if mesh == "8" else 4
    for path, weight in flatten(runner.params).items():
        dense = np.asarray(dequantize(weight, jnp.float32))
        np.testing.assert_array_equal(dense, wanted[path], err_msg=path)
        if isinstance(weight, Quantized):
            local = weight.data.sharding.shard_shape(weight.data.shape)
            assert np.prod(local) * parts == weight.data.size, path


def test_for_fast_kernels_scales_are_wide_and_mean_the_same(stored):
    """Where the others leave them as they are stored."""
    form, folder, config, wanted = stored
    runner = Runner(config, "8", "float32")
    runner.load(folder, progress=False)
    plain = flatten(runner.params)
    runner.kernels = "hopper"  # which no CPU runs
    runner.load(folder, progress=False)
    narrow = [path for path, weight in plain.items() if isinstance(weight, Quantized)]
    assert any(plain[path].scale.dtype == jnp.bfloat16 for path in narrow) == (form in BFLOAT16)
    for path, weight in flatten(runner.params).items():
        np.testing.assert_array_equal(dequantize(weight, jnp.float32), wanted[path], err_msg=path)
        if path in narrow:
            assert weight.scale.dtype == jnp.float32, path
            assert weight.scale.sharding == plain[path].scale.sharding, path


@pytest.mark.slow
def test_logits_are_those_of_the_dequantized_weights(stored, monkeypatch):
    """To float32's accuracy, once fp8's rounding of the activations is left out: that rounding is
    compared, product by product, in tests/test_formats.py, and as a whole with the reference's."""
    _, folder, config, wanted = stored

    def leave_alone(x, summed):
        return x, jnp.squeeze(jnp.ones_like(x).max(axis=summed, keepdims=True), summed)

    ids = weights.random_ids(29, 3)
    dense = unflatten({path: jnp.asarray(weight) for path, weight in wanted.items()})
    reference = models.run_in_pieces(models.Tiny(config, dense), ids, [7])
    monkeypatch.setattr(formats, "quantize_tokens", leave_alone)
    jax.clear_caches()  # of programs that round
    found = models.run_in_pieces(models.Tiny(config, load(folder, config)), ids, [7])
    jax.clear_caches()
    assert np.linalg.norm(found - reference) / np.linalg.norm(reference) < 1e-5


@pytest.mark.slow
def test_an_engine_gives_the_same_tokens_on_one_device_and_on_eight(stored):
    """int4 exactly. fp8 experts are cut inside: each device scales its own part of a token's hidden
    activations, so the rounding differs, and only the first tokens are compared."""
    form, folder, config, _ = stored
    ids, found = weights.random_ids(29, 3).tolist(), []
    for mesh in ("1", "8"):
        runner = Runner(config, mesh, "float32")
        runner.load(folder, progress=False)
        engine_config = EngineConfig(max_model_len=64, max_num_seqs=1, block_size=4)
        engine = Engine(runner, engine_config)
        engine.add(ids, GREEDY.replace(max_tokens=20 if form in ("w4a16", *WIDE) else 1))
        found.append(run_all(engine)[0])
    assert found[0] == found[1]


def test_nvfp4_by_modelopt_comes_fused_and_one_by_one_and_in_attention(tmp_path, monkeypatch):
    """Decoded whole and in pieces of a few rows."""
    raw = weights.tiny_config("maverick", num_hidden_layers=4, head_dim=16, **WIDTHS)
    tensors = weights.random_tensors(weights.tensor_shapes(raw), 1)
    single, about = quantized.quantize_tensors(tensors, "modelopt-nvfp4", fused=False)
    for name in [name for name in single if "language" in name and "self_attn" in name]:
        # As a matrix that the writer takes, under another name.
        made, _ = quantized.quantize_tensors(
            {name.replace("self_attn", "feed_forward"): tensors[name]}, "modelopt-nvfp4"
        )
        single |= {other.replace("feed_forward", "self_attn"): x for other, x in made.items()}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": about}))
    write_safetensors(tmp_path / "model.safetensors", single)
    config = checkpoint.load_config(tmp_path)
    wanted = arrange(quantized.decode_tensors(single, "modelopt-nvfp4"), config)
    for decoded in (parameters.DECODED_VALUES, 300):
        monkeypatch.setattr(parameters, "DECODED_VALUES", decoded)
        for path, weight in flatten(load(tmp_path, config)).items():
            np.testing.assert_array_equal(np.asarray(weight), wanted[path], err_msg=path)


@pytest.mark.parametrize("shape", get_args(quantized.ScaleShape))
def test_fp8_scales_come_in_several_shapes(shape, tmp_path):
    raw = weights.tiny_config("scout", **WIDTHS)
    tensors = weights.random_tensors(weights.tensor_shapes(raw), 1)
    made, about = quantized.quantize_tensors(
        tensors, "fp8-dynamic", scale_dtype="F32", scale_shape=shape
    )
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": about}))
    write_safetensors(tmp_path / "model.safetensors", made)
    config = checkpoint.load_config(tmp_path)
    wanted = arrange(quantized.decode_tensors(made, "fp8-dynamic"), config)
    for path, weight in flatten(load(tmp_path, config)).items():
        dense = np.asarray(dequantize(weight, jnp.float32))
        np.testing.assert_array_equal(dense, wanted[path], err_msg=path)


def spoil(folder, tmp_path, change):
    """The checkpoint with one tensor changed: `change` gets and returns the dictionary of all."""
    index = Index.open(folder)
    tensors = change({name: np.array(index.view(name)) for name in index.specs})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    write_safetensors(tmp_path / "model.safetensors", tensors)
    return tmp_path


def test_wrong_bytes_are_named(stored, tmp_path):
    form, folder, config, _ = stored
    layer = max(i for i in range(config.text.layers) if config.text.is_moe(i))
    experts = f"language_model.model.layers.{layer}.feed_forward.experts."
    base = experts + "1.up_proj.weight"
    is_fused = form.startswith("modelopt")
    scale = experts + "gate_up_proj_weight_scale" if is_fused else base + "_scale"

    def drop(tensors):
        return {name: x for name, x in tensors.items() if name != scale}

    def reshape(tensors):
        return {**tensors, scale: np.ones((3, 1), tensors[scale].dtype)}

    def shorten(tensors):
        return {**tensors, weight: tensors[weight][..., :-1].copy()}

    def widen(tensors):
        rest = {name: x for name, x in tensors.items() if not name.startswith(base)}
        out, width = config.text.expert_width, config.text.width
        return {**rest, base: np.ones((out, width), np.float32)}

    def double(tensors):
        return {**tensors, scale + "_2": np.ones(2, np.float32)}

    def reorder(tensors):
        order = np.arange(config.text.width, dtype=np.int32)[::-1].copy()
        return {**tensors, base + "_g_idx": order}

    weight = base + "_packed" if form in ("w4a16", "nvfp4") else base
    weight = experts + "gate_up_proj" if is_fused else weight
    says = f"has {scale} nothing instead of" if form in WIDE else f"lacks {scale}"
    cases = [(drop, says), (reshape, re.escape(scale))]
    cases.append((shorten, re.escape(weight)))
    if form == "modelopt-nvfp4":
        cases.append((double, re.escape(f"has {scale}_2 [2] instead of one number")))
    if not is_fused:
        cases.append((widen, "quantized in different formats: .*unquantized"))
    if form == "w4a16":
        cases.append((reorder, f"{base}_g_idx puts columns into groups out of order"))
    for number, (change, says) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        wrong = spoil(folder, tmp_path / str(number), change)
        with pytest.raises(CheckpointError, match=says) as refused:
            load(wrong, config)
        # A tensor that is wrong lies in a file, one that is absent in none.
        is_there = "lacks" not in says and "nothing" not in says and "different formats" not in says
        assert (str(wrong / "model.safetensors") in str(refused.value)) == is_there, says


# Of 32 columns eight devices have half a word each; of 384 whole words, and three quarters of 64.
@pytest.mark.parametrize(("columns", "group"), [(32, 16), (384, 64)])
def test_devices_that_would_cut_a_group_are_refused(columns, group, tmp_path):
    raw = weights.tiny_config("scout", hidden_size=64, intermediate_size=columns)
    quantized.write_checkpoint(tmp_path, raw, 0, "w4a16", group_size=group)
    runner = Runner(checkpoint.load_config(tmp_path), "8", "float32")
    says = f"keeps {group} values together, and 8 devices would cut through them: take fewer"
    with pytest.raises(CheckpointError, match=says):
        runner.load(tmp_path, progress=False)
