"""Laws of reading quantized checkpoints: bit-exact with an independent decoder, on any mesh."""

import json
import re
import tracemalloc
from typing import Any, get_args

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
from l4jax.config import ConfigError
from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.runner import Runner
from l4jax.kernels import formats
from l4jax.kernels.formats import Quantized, dequantize
from tests import models, quantized, tiers, weights
from tests.checkpoint.published import arrange
from tests.engine.engines import GREEDY, run_all

# Widths of which eight devices cut no group of 16 columns.
WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "intermediate_size_mlp": 128}
SCHEMES = get_args(quantized.Scheme)
DISTINCT = ("fp8-dynamic", "w4a16", "nvfp4")  # one scheme for each format on the device
# Schemes that are dequantized to the model's dtype on loading; and the dtypes of loaded data.
DEQUANTIZED = ("nvfp4", "modelopt-nvfp4")
DATA_DTYPES = {scheme: {"float8_e4m3fn"} for scheme in SCHEMES} | {"w4a16": {"int4"}}
DATA_DTYPES |= {scheme: set() for scheme in DEQUANTIZED}
BFLOAT16_SCALES = ("fp8-dynamic", "maverick-fp8", "w4a16")


def place(_names):
    return SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module", params=SCHEMES)
def stored(request, tmp_path_factory):
    """A checkpoint: (scheme, folder, config, parameters by an independent decoder)."""
    scheme = request.param
    folder = tmp_path_factory.mktemp(scheme)
    raw = weights.tiny_config(
        "maverick" if scheme == "maverick-fp8" else "scout", attention_chunk_size=8, **WIDTHS
    )
    quantized.write_checkpoint(folder, raw, 0, scheme, shards=2, group_size=16)
    config = checkpoint.load_config(folder)
    index = Index.open(folder)
    tensors = {name: np.array(index.view(name)) for name in index.specs}
    return scheme, folder, config, arrange(quantized.decode_tensors(tensors, scheme), config)


def load(folder, config, dtype="float32"):
    return checkpoint.load(folder, config, dtype, place, progress=False)


def test_loaded_weights_equal_an_independent_decoding(stored):
    scheme, folder, config, wanted = stored
    found = flatten(load(folder, config))
    assert set(found) == set(wanted)
    for path, weight in found.items():
        dense = np.asarray(dequantize(weight, jnp.float32))
        np.testing.assert_array_equal(dense, wanted[path], err_msg=path)
    quantized_paths = {path for path, weight in found.items() if isinstance(weight, Quantized)}
    assert {found[path].data.dtype.name for path in quantized_paths} == DATA_DTYPES[scheme]
    has_shared = any("/shared/" in path for path in quantized_paths)
    assert has_shared == (scheme not in ("maverick-fp8", *DEQUANTIZED))
    assert any("/attention/" in path for path in quantized_paths) == (scheme == "modelopt-fp8")
    assert not any("router" in path or "norm" in path for path in quantized_paths)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16", *DEQUANTIZED])
def test_host_memory_holds_two_slices_and_one_decoded_block(scheme, tmp_path, monkeypatch):
    """jax frees two more slices a call later. Decoding a slice at once would take five more."""
    raw = weights.text_only(
        weights.tiny_config("scout", intermediate_size=2048, num_hidden_layers=3, hidden_size=128)
    )
    quantized.write_checkpoint(tmp_path, raw, 0, scheme)
    config = checkpoint.load_config(tmp_path)
    monkeypatch.setattr(parameters, "DECODED_VALUES", 2**14)
    load(tmp_path, config, "bfloat16")  # excludes imports and compilation
    found, peaks = {}, []
    for _ in range(3):  # jax sometimes frees a slice even later
        tracemalloc.start()
        found = flatten(load(tmp_path, config, "bfloat16"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    data = [weight.data if isinstance(weight, Quantized) else weight for weight in found.values()]
    largest = max(array.nbytes for array in data)
    assert largest > 20 * 2**14
    assert min(peaks) < 4.5 * largest + 40 * 2**14


@pytest.mark.parametrize(
    ("stored", "mesh"), tiers.pairs(SCHEMES, ["8", "2x4"]), indirect=["stored"]
)
def test_each_device_has_its_slices_of_data_and_scales(stored, mesh):
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


def test_scales_are_upcast_for_hopper_kernels_with_equal_values(stored):
    """Other kernels take scales in their stored dtype."""
    scheme, folder, config, wanted = stored
    runner = Runner(config, "8", "float32")
    runner.load(folder, progress=False)
    plain = flatten(runner.params)
    runner.kernels = "hopper"  # not run on a CPU
    runner.load(folder, progress=False)
    quantized_paths = [path for path, weight in plain.items() if isinstance(weight, Quantized)]
    assert any(plain[path].scale.dtype == jnp.bfloat16 for path in quantized_paths) == (
        scheme in BFLOAT16_SCALES
    )
    for path, weight in flatten(runner.params).items():
        np.testing.assert_array_equal(dequantize(weight, jnp.float32), wanted[path], err_msg=path)
        if path in quantized_paths:
            assert weight.scale.dtype == jnp.float32, path
            assert weight.scale.sharding == plain[path].scale.sharding, path


@pytest.mark.slow
@pytest.mark.parametrize("stored", DISTINCT, indirect=True)
def test_logits_equal_those_of_the_dequantized_weights(stored, monkeypatch):
    """Activations are not rounded here, so that float32's accuracy is expected.

    Their rounding is compared per product in tests/test_formats.py, and for the whole model in
    tests/reference/test_fp8_reference.py.
    """
    _, folder, config, wanted = stored

    def keep_unrounded(x, summed):
        return x, jnp.squeeze(jnp.ones_like(x).max(axis=summed, keepdims=True), summed)

    ids = weights.random_ids(29, 3)
    dense = unflatten({path: jnp.asarray(weight) for path, weight in wanted.items()})
    reference = models.run_in_pieces(models.Tiny(config, dense), ids, [7])
    monkeypatch.setattr(formats, "quantize_tokens", keep_unrounded)
    jax.clear_caches()  # programs that round
    found = models.run_in_pieces(models.Tiny(config, load(folder, config)), ids, [7])
    jax.clear_caches()
    assert np.linalg.norm(found - reference) / np.linalg.norm(reference) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stored", DISTINCT, indirect=True)
def test_engine_gives_the_same_tokens_on_one_and_eight_devices(stored):
    """int4 gives the same tokens. fp8 experts are sharded along the hidden axis: each device scales
    its own slice of a token's activations, so rounding differs, and one token is compared."""
    scheme, folder, config, _ = stored
    ids, found = weights.random_ids(29, 3).tolist(), []
    for mesh in ("1", "8"):
        runner = Runner(config, mesh, "float32")
        runner.load(folder, progress=False)
        engine_config = EngineConfig(max_model_len=64, max_num_seqs=1, block_size=4)
        engine = Engine(runner, engine_config)
        engine.add(ids, GREEDY.replace(max_tokens=20 if scheme in ("w4a16", *DEQUANTIZED) else 1))
        found.append(run_all(engine)[0])
    assert found[0] == found[1]


def test_modelopt_nvfp4_is_read_fused_unfused_and_in_attention(tmp_path, monkeypatch):
    """It is decoded at once and in blocks of a few rows."""
    raw = weights.tiny_config("maverick", num_hidden_layers=4, head_dim=16, **WIDTHS)
    tensors = weights.random_tensors(weights.tensor_shapes(raw), 1)
    single, description = quantized.quantize_tensors(tensors, "modelopt-nvfp4", fused=False)
    for name in [name for name in single if "language" in name and "self_attn" in name]:
        # The writer quantizes no attention: the matrix gets another name.
        made, _ = quantized.quantize_tensors(
            {name.replace("self_attn", "feed_forward"): tensors[name]}, "modelopt-nvfp4"
        )
        single |= {other.replace("feed_forward", "self_attn"): x for other, x in made.items()}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": description}))
    write_safetensors(tmp_path / "model.safetensors", single)
    config = checkpoint.load_config(tmp_path)
    wanted = arrange(quantized.decode_tensors(single, "modelopt-nvfp4"), config)
    for decoded in (parameters.DECODED_VALUES, 300):
        monkeypatch.setattr(parameters, "DECODED_VALUES", decoded)
        for path, weight in flatten(load(tmp_path, config)).items():
            np.testing.assert_array_equal(np.asarray(weight), wanted[path], err_msg=path)


@pytest.mark.parametrize("shape", get_args(quantized.ScaleShape))
def test_fp8_scales_of_every_shape_are_read(shape, tmp_path):
    raw = weights.tiny_config("scout", **WIDTHS)
    tensors = weights.random_tensors(weights.tensor_shapes(raw), 1)
    made, description = quantized.quantize_tensors(
        tensors, "fp8-dynamic", scale_dtype="F32", scale_shape=shape
    )
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": description}))
    write_safetensors(tmp_path / "model.safetensors", made)
    config = checkpoint.load_config(tmp_path)
    wanted = arrange(quantized.decode_tensors(made, "fp8-dynamic"), config)
    for path, weight in flatten(load(tmp_path, config)).items():
        dense = np.asarray(dequantize(weight, jnp.float32))
        np.testing.assert_array_equal(dense, wanted[path], err_msg=path)


def spoil(folder, tmp_path, change):
    """Write the checkpoint with changed tensors: `change` maps all tensors to new ones."""
    index = Index.open(folder)
    tensors = change({name: np.array(index.view(name)) for name in index.specs})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    write_safetensors(tmp_path / "model.safetensors", tensors)
    return tmp_path


def test_wrong_tensors_are_named(stored, tmp_path):
    scheme, folder, config, _ = stored
    layer = max(i for i in range(config.text.layers) if config.text.is_moe(i))
    experts = f"language_model.model.layers.{layer}.feed_forward.experts."
    base = experts + "1.up_proj.weight"
    is_fused = scheme.startswith("modelopt")
    scale = experts + "gate_up_proj_weight_scale" if is_fused else base + "_scale"

    def drop(tensors):
        return {name: x for name, x in tensors.items() if name != scale}

    def reshape(tensors):
        return {**tensors, scale: np.ones((3, 1), tensors[scale].dtype)}

    def shorten(tensors):
        return {**tensors, weight: tensors[weight][..., :-1].copy()}

    def store_as_float32(tensors):
        rest = {name: x for name, x in tensors.items() if not name.startswith(base)}
        out, width = config.text.expert_width, config.text.width
        return {**rest, base: np.ones((out, width), np.float32)}

    def double(tensors):
        return {**tensors, scale + "_2": np.ones(2, np.float32)}

    def reorder(tensors):
        order = np.arange(config.text.width, dtype=np.int32)[::-1].copy()
        return {**tensors, base + "_g_idx": order}

    weight = base + "_packed" if scheme in ("w4a16", "nvfp4") else base
    weight = experts + "gate_up_proj" if is_fused else weight
    says = f"has {scale} nothing instead of" if scheme in DEQUANTIZED else f"lacks {scale}"
    cases = [(drop, says), (reshape, re.escape(scale))]
    cases.append((shorten, re.escape(weight)))
    if scheme == "modelopt-nvfp4":
        cases.append((double, re.escape(f"has {scale}_2 [2] instead of one number")))
    if not is_fused:
        cases.append((store_as_float32, "quantized in different formats: .*unquantized"))
    if scheme == "w4a16":
        cases.append((reorder, f"{base}_g_idx puts columns into groups out of order"))
    for number, (change, says) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        wrong = spoil(folder, tmp_path / str(number), change)
        with pytest.raises(CheckpointError, match=says) as refused:
            load(wrong, config)
        # An error about a wrong tensor names its file; a missing tensor has none.
        is_there = "lacks" not in says and "nothing" not in says and "different formats" not in says
        assert (str(wrong / "model.safetensors") in str(refused.value)) == is_there, says


# Each of eight devices would have half a word of 32 columns, or 3/4 of a group of 384 columns.
@pytest.mark.parametrize(("columns", "group"), [(32, 16), (384, 64)])
def test_mesh_that_cuts_a_group_is_refused(columns, group, tmp_path):
    raw = weights.tiny_config("scout", hidden_size=64, intermediate_size=columns)
    quantized.write_checkpoint(tmp_path, raw, 0, "w4a16", group_size=group)
    runner = Runner(checkpoint.load_config(tmp_path), "8", "float32")
    says = f"keeps {group} values together, and 8 devices would cut through them: take fewer"
    with pytest.raises(CheckpointError, match=says):
        runner.load(tmp_path, progress=False)


def test_an_int4_weight_with_zero_points_is_refused_and_one_without_is_not(tmp_path):
    """As compressed-tensors writes `symmetric: false`: packed along the outputs, 8 for zero."""
    raw = weights.tiny_config("scout", attention_chunk_size=8, **WIDTHS)
    quantized.write_checkpoint(tmp_path, raw, 0, "w4a16", group_size=16)
    index = Index.open(tmp_path)
    packed = next(name for name in sorted(index.specs) if name.endswith("weight_packed"))
    groups = index.specs[packed.replace("_packed", "_scale")][1]
    name = packed.replace("_packed", "_zero_point")
    tensors = {name: np.array(index.view(name)) for name in index.specs}
    file = index.tensors[packed].path
    config = checkpoint.load_config(tmp_path)
    for word, is_zero in ((0x88888888, True), (0x88888889, False)):
        words = np.full((groups[0] // 8, groups[1]), word, np.uint32).view(np.int32)
        write_safetensors(file, {**tensors, name: words})
        if is_zero:
            load(tmp_path, config)
            continue
        with pytest.raises(CheckpointError, match="weight_zero_point is asymmetric quantization"):
            load(tmp_path, config)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "hqq", "fbgemm_fp8", 8])
def test_other_quantizers_are_refused_by_name(tmp_path, method):
    raw = weights.tiny_config("scout")
    weights.write_checkpoint(tmp_path, raw | {"quantization_config": {"quant_method": method}}, 0)
    with pytest.raises(ConfigError, match=re.escape(f"quant_method is {method!r}: l4jax reads")):
        checkpoint.load_config(tmp_path)


def test_gguf_files_and_rotated_activations_are_refused(tmp_path):
    (tmp_path / "scout-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="holds GGUF files, which l4jax does not read"):
        checkpoint.load_config(tmp_path)
    config = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}
    raw = weights.tiny_config("scout") | {"quantization_config": config}
    weights.write_checkpoint(tmp_path, raw, 0)
    with pytest.raises(ConfigError, match="transform_config rotates activations"):
        checkpoint.load_config(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", ["1", "2x4"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, mesh):
    raw = weights.tiny_config("scout", attention_chunk_size=8)
    weights.write_checkpoint(tmp_path, raw, 0)
    index = Index.open(tmp_path)
    tensors = {name: np.array(index.view(name)) for name in index.specs}
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    tensors[name][-1, -1] = value
    write_safetensors(index.tensors[name].path, tensors)
    runner = Runner(checkpoint.load_config(tmp_path), mesh, "float32")
    with pytest.raises(CheckpointError, match=r"not finite .* in text/layer_1/attention/qkv"):
        runner.load(tmp_path, progress=False)


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "w4a16"])
def test_quantized_weights_that_are_not_finite_are_refused(tmp_path, scheme):
    raw = weights.tiny_config("scout", attention_chunk_size=8, **WIDTHS)
    quantized.write_checkpoint(tmp_path, raw, 0, scheme, group_size=16)
    index = Index.open(tmp_path)
    tensors = {name: np.array(index.view(name)) for name in index.specs}
    name = next(name for name in sorted(tensors) if name.endswith("weight_scale"))
    tensors[name][0, 0] = np.nan
    write_safetensors(index.tensors[name].path, tensors)
    with pytest.raises(CheckpointError, match="weights that are not finite"):
        load(tmp_path, checkpoint.load_config(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_accelerators_reduce_to_what_numpy_finds_on_cpu_devices(dtype):
    array = jnp.ones((3, 5), dtype)
    for value, is_finite in ((1.0, True), (np.nan, False)):
        changed = array.at[2, 4].set(value)
        assert bool(parameters._reduce_finite(changed)) is is_finite
        assert bool(parameters._is_finite(changed)) is is_finite
