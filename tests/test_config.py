"""Every key of a config.json is read, required or known to be harmless; the rest is refused."""

import copy
import dataclasses
import json

import pytest

from l4jax.config import MAVERICK, SCOUT, TINY, Config, ConfigError
from tests import weights

# What the published files hold and TINY's, SCOUT's or MAVERICK's own `to_hf` does not write.
PUBLISHED = {
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "transformers_version": "4.51.0.dev0",
    "torch_dtype": "bfloat16",
}
PUBLISHED_TEXT = {
    "_attn_implementation_autoset": True,
    "attention_dropout": 0.0,
    "for_llm_compressor": False,
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# Absent from the published files: their defaults have to be right.
ABSENT_TEXT = ("attn_temperature_tuning", "floor_scale", "attn_scale")


def make_published(config: Config, rope_layers: list[int] | None) -> dict:
    raw = {**config.to_hf(), **PUBLISHED}
    text = {**raw["text_config"], **PUBLISHED_TEXT}
    for key in (*ABSENT_TEXT, "no_rope_layers"):
        text.pop(key)
    if rope_layers is not None:
        text["no_rope_layers"] = rope_layers
    return {**raw, "text_config": text}


@pytest.fixture
def raw():
    return copy.deepcopy(make_published(SCOUT, []))


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize("rope_layers", [None, [], [1, 1, 1, 0] * 12], ids=["absent", "[]", "list"])
def test_the_published_files_are_read(config, rope_layers):
    assert Config.from_hf(make_published(config, rope_layers)) == config


@pytest.mark.parametrize("config", [SCOUT, MAVERICK, TINY], ids=["scout", "maverick", "tiny"])
def test_what_is_written_is_read_back(config):
    config = dataclasses.replace(config, patch_id=7)
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    alone = dataclasses.replace(config, vision=None, patch_id=None)
    assert Config.from_hf(json.loads(json.dumps(alone.to_hf()))) == alone


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_both_spellings_say_the_same(kind):
    published = Config.from_hf(weights.tiny_config(kind))
    assert Config.from_hf(weights.tiny_config(kind, style="transformers5")) == published


def test_the_text_model_alone_is_read():
    raw = weights.tiny_config("scout")
    whole, alone = Config.from_hf(raw), Config.from_hf(weights.text_only(raw))
    assert alone.text == whole.text and alone.vision is None and alone.patch_id is None
    assert alone.eos_ids == whole.eos_ids == (2, 3)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_experts_per_tok", 2, "num_experts_per_tok is 2, and l4jax computes only 1"),
        ("attention_bias", True, "attention_bias is True, and l4jax computes only false"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("no_rope_layers", [1, 0, 0, 1] * 12, "no_rope_layers is "),
        ("layer_types", ["full_attention"] * 48, "layer_types is "),
        ("moe_layers", [0, 5], "moe_layers is "),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope_scaling.factor is missing"),
        ("attention_chunk_size", 0, "attention_chunk_size is 0, not a positive int"),
        ("attention_chunk_size", None, "attention_chunk_size is None"),
        ("num_hidden_layers", True, "num_hidden_layers is True"),
        ("num_attention_heads", 41, "num_attention_heads is 41: 8 kv heads cannot share them"),
        ("use_qk_norm", "yes", "use_qk_norm is 'yes', neither true nor false"),
        ("sliding_window", 512, "sliding_window is 512: a key that l4jax does not know"),
    ],
)
def test_a_text_key_that_we_do_not_compute_is_refused_by_name(raw, key, value, says):
    raw["text_config"][key] = value
    with pytest.raises(ConfigError, match=says.replace("[", r"\[").replace(".", r"\.")):
        Config.from_hf(raw)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_act", "relu", "vision_config.hidden_act is 'relu'"),
        ("pixel_shuffle_ratio", 0.25, "pixel_shuffle_ratio is 0.25, and l4jax computes only 0.5"),
        ("projector_input_dim", 2048, "projector_input_dim is 2048"),
        ("multi_modal_projector_bias", True, "multi_modal_projector_bias is True"),
        ("vision_feature_layer", -2, "vision_feature_layer is -2"),
        ("norm_eps", 1e-6, "norm_eps is 1e-06"),
        ("image_size", 340, "image_size is 340"),
        ("intermediate_size", 1408, "it must be 4 \\* hidden_size"),
        ("depth", 3, "vision_config.depth is 3: a key that l4jax does not know"),
    ],
)
def test_a_vision_key_that_we_do_not_compute_is_refused_by_name(raw, key, value, says):
    raw["vision_config"][key] = value
    with pytest.raises(ConfigError, match=says):
        Config.from_hf(raw)


def test_another_model_is_refused_by_its_type():
    with pytest.raises(ConfigError, match=r"model_type is 'llama': l4jax computes Llama 4 only"):
        Config.from_hf({"model_type": "llama"})
    with pytest.raises(ConfigError, match="model_type is None"):
        Config.from_hf({})


def test_a_missing_key_is_named(raw):
    del raw["text_config"]["hidden_size"]
    with pytest.raises(ConfigError, match=r"text_config\.hidden_size is missing"):
        Config.from_hf(raw)


def test_a_folder_without_a_config_and_one_with_a_broken_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Config.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="is not JSON"):
        Config.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not an object"):
        Config.from_folder(tmp_path)


def test_how_weights_are_quantized_does_not_change_the_model(raw):
    raw["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert Config.from_hf(raw) == SCOUT


def test_layers_are_of_the_published_kinds():
    text = SCOUT.text
    assert [i for i in range(48) if text.is_nope(i)] == list(range(3, 48, 4))
    assert all(text.is_moe(i) for i in range(48))
    assert [i for i in range(48) if MAVERICK.text.is_moe(i)] == list(range(1, 48, 2))
    assert text.queries == 5 and SCOUT.vision is not None and SCOUT.vision.features == 144
