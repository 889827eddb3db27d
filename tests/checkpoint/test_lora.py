"""Laws of LoRA adapters: merging, placement, files and refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l4jax import checkpoint, convert
from l4jax.checkpoint import Adapter, CheckpointError, OnlineQuantization, peft
from l4jax.checkpoint.adapter import expand_factors, shape_factors
from l4jax.checkpoint.parameters import flatten
from l4jax.config import Config
from l4jax.kernels.formats import Adapted, Quantized, dequantize, multiply
from l4jax.testing import write_model
from tests import weights
from tests.adapters import make_adapter
from tests.checkpoint.published import arrange, place_on_mesh, place_on_one

RAW = {
    kind: weights.tiny_config(kind, num_hidden_layers=2, intermediate_size=48)
    for kind in ("scout", "maverick")
}
MESH = {
    "hidden": "model",
    "expert_hidden": "model",
    "kv_heads": "model",
    "vocab": "model",
    "vision_hidden": "model",
}
EVERYTHING = ".*"


@pytest.fixture(scope="module", params=["scout", "maverick"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    weights.write_checkpoint(folder, RAW[request.param], 3)
    return folder


def load(folder: Path, lora: Adapter | None, place: Any = place_on_one, **rest: Any) -> Any:
    config, dtype = checkpoint.load_config(folder), rest.pop("dtype", "float32")
    tree = checkpoint.load(folder, config, dtype, place, lora=lora, progress=False, **rest)
    return flatten(tree)


def read_stored(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, adapter: Adapter, config: Config, **settings: Any) -> Path:
    """Write an adapter with other values in its config."""
    checkpoint.write_adapter(folder, adapter, config, "base")
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_merged_parameters_equal_stored_matrices_plus_factors(base, tmp_path):
    """The expectation is W + alpha / r * B A in numpy, per tensor under PEFT's names."""
    config = checkpoint.load_config(base)
    adapter = make_adapter(config, EVERYTHING)
    checkpoint.write_adapter(tmp_path, adapter, config, "base")
    tensors, found = read_stored(base), load_file(tmp_path / peft.WEIGHTS)
    prefix, rank, experts = "base_model.model.", adapter.rank, config.text.experts
    changed = 0
    for name, weight in tensors.items():
        if weight.ndim == 3:
            module = prefix + name.rpartition(".")[0]
            module += ".base_layer" if name.endswith("gate_up_proj") else ""
        else:
            module = prefix + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in found:
            continue
        changed += 1
        a, b = (found.pop(f"{module}.lora_{x}.weight") for x in "AB")
        if weight.ndim == 2:
            tensors[name] = weight + 2 * b @ a
        for expert in range(experts if weight.ndim == 3 else 0):
            rows, columns = slice(expert * rank, (expert + 1) * rank), slice(expert, None, experts)
            tensors[name][expert] = weight[expert] + 2 * b[:, columns] @ a[rows]
    assert changed > 20 and not found
    wanted, merged = arrange(tensors, config), load(base, adapter)
    for path, array in merged.items():
        np.testing.assert_allclose(array, wanted[path], rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("pattern", [r"text/.*/attention/.*", r".*/shared/.*", EVERYTHING])
def test_written_adapter_is_read_back(base, pattern, tmp_path):
    config = checkpoint.load_config(base)
    adapter = make_adapter(config, pattern)
    checkpoint.write_adapter(tmp_path, adapter, config, "base")
    again = checkpoint.read_adapter(tmp_path, config)
    assert (again.rank, again.alpha) == (adapter.rank, adapter.alpha)
    assert set(again.factors) == set(adapter.factors) and adapter.factors
    jax.tree.map(np.testing.assert_array_equal, dict(again.factors), dict(adapter.factors))


def test_adapter_of_a_text_only_model_fits_the_model_with_vision(tmp_path):
    whole = checkpoint.parse_config(RAW["scout"])
    text = dataclasses.replace(whole, vision=None)
    adapter = make_adapter(text)
    checkpoint.write_adapter(tmp_path, adapter, text, "base")
    assert not any("language_model" in name for name in load_file(tmp_path / peft.WEIGHTS))
    again = checkpoint.read_adapter(tmp_path, whole)
    jax.tree.map(np.testing.assert_array_equal, dict(again.factors), dict(adapter.factors))


@pytest.mark.parametrize("width", [48, 64], ids=["layout by shapes", "layout by version"])
def test_fused_experts_are_read_in_the_layout_before_0_19_1(width, tmp_path):
    """Before 0.19.1, A ended in the inputs for fused experts as for matrices."""
    config = checkpoint.parse_config(weights.tiny_config("scout", intermediate_size=width))
    adapter = make_adapter(config, r"text/layer_0/feed_forward/(gate_up|down)")
    save(tmp_path, adapter, config, peft_version="0.18.0")
    path, experts, rank = tmp_path / peft.WEIGHTS, config.text.experts, adapter.rank
    tensors = load_file(path)
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a = tensors[name].reshape(experts, rank, -1)
        b = tensors[other].reshape(-1, rank, experts).transpose(2, 1, 0)
        tensors[name] = np.ascontiguousarray(b.reshape(experts * rank, -1))
        tensors[other] = np.ascontiguousarray(a.transpose(2, 1, 0).reshape(-1, experts * rank))
    save_file(tensors, path)
    again = checkpoint.read_adapter(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, dict(again.factors), dict(adapter.factors))


def test_second_factor_of_zeros_changes_no_weight(base):
    adapter = make_adapter(checkpoint.load_config(base), EVERYTHING)
    factors = {
        path: its | {"second": np.zeros_like(its["second"])}
        for path, its in adapter.factors.items()
    }
    zero = dataclasses.replace(adapter, factors=factors)
    jax.tree.map(np.testing.assert_array_equal, load(base, zero), load(base, None))


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "one by one"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_on_a_mesh_equals_merging_on_one_device(dtype, unfused, tmp_path):
    weights.write_checkpoint(tmp_path, RAW["scout"], 3, dtype="BF16", fused=not unfused)
    adapter = make_adapter(checkpoint.load_config(tmp_path), EVERYTHING)
    one = load(tmp_path, adapter, dtype=dtype)
    place = place_on_mesh(**MESH)
    many = load(tmp_path, adapter, place, dtype=dtype)
    for path, array in many.items():
        assert array.dtype == dtype
        error = 1e-6 if dtype == "float32" else 2**-8  # one rounding step of bfloat16
        found, wanted = (np.asarray(x, np.float32) for x in (array, one[path]))
        np.testing.assert_allclose(found, wanted, rtol=error, atol=1e-6, err_msg=path)
    plain = load(tmp_path, None, place, dtype=dtype)
    assert {path: x.sharding for path, x in many.items()} == {
        path: x.sharding for path, x in plain.items()
    }


@pytest.mark.parametrize("choice", [("fp8",), ("int4", True)])
def test_merged_weights_are_quantized(base, choice):
    adapter = make_adapter(checkpoint.load_config(base))
    online_quantization = OnlineQuantization.choose(*choice)
    assert online_quantization is not None
    merged, found = (
        load(base, adapter),
        load(base, adapter, online_quantization=online_quantization),
    )
    count = 0
    for path, array in found.items():
        if isinstance(array, Quantized):
            count += 1
            in_axes = online_quantization.count_in_axes(path)
            assert in_axes
            names = ("",) * len(array.shape)
            wanted = online_quantization.quantize(merged[path], in_axes, names, place_on_one)
            jax.tree.map(np.testing.assert_array_equal, array, wanted)
    assert count > 4


def test_converted_checkpoint_merges_to_the_same_weights(base, tmp_path):
    config = checkpoint.load_config(base)
    assert convert.main([str(base), str(tmp_path / "ours"), "--quiet"]) == 0
    adapter = make_adapter(config, EVERYTHING)
    found, wanted = load(tmp_path / "ours", adapter), load(base, adapter)
    for path, array in found.items():
        np.testing.assert_allclose(array, wanted[path], rtol=1e-6, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("path", "subscripts", "shape"),
    [
        ("text/layer_0/attention/qkv", "TD,KJHD->TKJH", (2, 5, 4, 16)),
        ("text/layer_0/attention/out", "TKGH,DKGH->TD", (16, 2, 3, 4)),
        ("text/layer_0/feed_forward/gate_up", "ETD,EcFD->EcTF", (3, 2, 8, 16)),
        ("text/layer_0/feed_forward/down", "ETF,EDF->ETD", (3, 16, 8)),
        ("text/layer_0/feed_forward/shared/gate_up", "TD,cFD->cTF", (2, 8, 16)),
        ("text/layer_0/feed_forward/shared/down", "TF,DF->TD", (16, 8)),
    ],
)
def test_applied_adapter_equals_merged_adapter(path, subscripts, shape):
    """Compare a product with the weight and its factors to one with their sum."""
    rng = np.random.default_rng(0)
    shapes = shape_factors(path, shape, 3)
    assert shapes is not None
    first, second, weight = (
        rng.standard_normal(size).astype(np.float32) for size in (*shapes, shape)
    )
    adapted = Adapted(weight, *expand_factors(path, shape, {"first": first, "second": second}, 0.5))
    sizes = dict(zip(subscripts.split("->")[0].split(",")[1], shape, strict=True)) | {"T": 7}
    x = rng.standard_normal([sizes[c] for c in subscripts.partition(",")[0]]).astype(np.float32)
    found = multiply(subscripts, jnp.asarray(x), adapted)
    wanted = np.einsum(subscripts, x, np.asarray(dequantize(adapted, jnp.float32)))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(wanted - np.einsum(subscripts, x, weight)).max() > 0.1


REFUSED = [
    ({"use_dora": True}, "use_dora is True, which is not merged: train the adapter without it"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\].*merge_and_unload"),
    ({"rank_pattern": {"q_proj": 4}}, r"lora_A.weight \[3, \d+\] instead of \[4, \d+\]"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is {'q_proj': 0}: it must map"),
    ({"rank_pattern": {"(": 3}}, "rank_pattern is"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern is {'q_proj': nan}: it must map"),
    ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
    ({"something_new": 3}, "something_new is 3"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"r": 0}, "r is 0"),
    ({"r": 10**12}, "r is 1000000000000"),
    ({"lora_alpha": float("inf")}, "lora_alpha inf"),
    ({"r": 5}, r"lora_A.weight \[3, \d+\] instead of \[5, \d+\]"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[next(iter(x)) for x, _ in REFUSED])
def test_adapter_with_unsupported_setting_is_refused_by_key(settings, words, tmp_path):
    config = checkpoint.parse_config(RAW["scout"])
    adapter = make_adapter(config, r"text/layer_0/attention/.*")
    save(tmp_path, adapter, config, **settings)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read_adapter(tmp_path, config)


def test_rank_stabilized_scale_is_alpha_by_root_of_rank(tmp_path):
    config = checkpoint.parse_config(RAW["scout"])
    adapter = dataclasses.replace(make_adapter(config, r".*/attention/.*", rank=4), alpha=3)
    save(tmp_path, adapter, config, use_rslora=True)
    assert checkpoint.read_adapter(tmp_path, config).scale == 3 / 2


def test_wrong_adapter_files_are_refused_by_name(tmp_path):
    config = checkpoint.parse_config(RAW["scout"])
    adapter = make_adapter(config, r"text/layer_1/attention/.*")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json: pass the folder"):
        checkpoint.read_adapter(tmp_path, config)
    checkpoint.write_adapter(tmp_path, adapter, config, "base")
    path = tmp_path / peft.WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    at = "base_model.model.language_model.model.layers.1.self_attn."
    cases: list[tuple[dict[str, np.ndarray], str]] = [
        ({k: v for k, v in tensors.items() if k != name}, "lacks .*lora_A.weight"),
        (tensors | {name: tensors[name][:, :5].copy()}, r"\[3, 5\] instead of \[3, "),
        (tensors | {name: tensors[name].astype(np.int32)}, "in another dtype than BF16"),
        (tensors | {at + "x.lora_A.weight": tensors[name]}, r"has .*\.x\.lora_A.*no factors of"),
        ({}, "holds no factors"),
    ]
    for changed, words in cases:
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read_adapter(tmp_path, config)
    path.unlink()
    with pytest.raises(CheckpointError, match="save the adapter as safetensors"):
        checkpoint.read_adapter(tmp_path, config)
    (tmp_path / peft.CONFIG).write_text("{}")
    with pytest.raises(CheckpointError, match="is not the config of an adapter"):
        checkpoint.read_adapter(tmp_path, config)


def test_adapter_of_a_deeper_model_is_refused(tmp_path):
    deep = checkpoint.parse_config(weights.tiny_config("scout", num_hidden_layers=3))
    shallow = checkpoint.parse_config(weights.tiny_config("scout", num_hidden_layers=2))
    checkpoint.write_adapter(tmp_path, make_adapter(deep, r".*/attention/.*"), deep, "base")
    with pytest.raises(CheckpointError, match=r"layers\.2.*no factors of a matrix of this model"):
        checkpoint.read_adapter(tmp_path, shallow)


def test_adapter_of_quantized_weights_is_refused_and_others_are_merged(tmp_path):
    config = write_model(tmp_path, quantization="maverick-fp8")  # attention stays BF16
    experts = make_adapter(config, r"text/layer_0/feed_forward/.*")
    words = "is quantized already .*float-quantized fp8.* take the BF16 checkpoint"
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, experts, dtype="bfloat16")
    attention = make_adapter(config, r"text/layer_0/attention/.*")
    found, plain = (load(tmp_path, lora, dtype="bfloat16") for lora in (attention, None))
    path = "text/layer_0/attention/qkv"
    assert np.abs(np.asarray(found[path], np.float32) - np.asarray(plain[path], np.float32)).max()


@pytest.mark.parametrize("inside", ["", ".base_layer"])
def test_stored_head_is_taken_if_it_is_the_models_and_refused_if_not(base, tmp_path, inside):
    """PEFT stores the head, and with an option the embedding, beside the factors."""
    config = checkpoint.load_config(base)
    adapter = make_adapter(config, ".*/(head|attention/out)")
    checkpoint.write_adapter(tmp_path, adapter, config, "base")
    path = tmp_path / peft.WEIGHTS
    head = read_stored(base)["language_model.lm_head.weight"]
    name = f"base_model.model.language_model.lm_head{inside}.weight"
    expected = load(base, adapter)
    tensors = load_file(path)
    save_file(tensors | {name: head}, path)
    found = load(base, checkpoint.read_adapter(tmp_path, config))
    for key, array in found.items():
        np.testing.assert_array_equal(array, expected[key])
    save_file(tensors | {name: head + np.float32(1)}, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight, which differs from the base"):
        load(base, checkpoint.read_adapter(tmp_path, config))
