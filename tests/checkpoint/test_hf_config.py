"""Laws of config.json: each key is read, required or known to be harmless; others are refused."""

import copy
import dataclasses
import json

import pytest

from l4jax.checkpoint import format_config, load_config, parse_config
from l4jax.config import MAVERICK, SCOUT, TINY, Config, ConfigError
from tests import weights

# Keys that the published files have and `format_config` does not write.
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
# Keys that the published files lack: their defaults must be right.
ABSENT_TEXT = ("attn_temperature_tuning", "floor_scale", "attn_scale")


def make_published(config: Config, rope_layers: list[int] | None) -> dict:
    raw = {**format_config(config), **PUBLISHED}
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
def test_published_configs_are_parsed(config, rope_layers):
    assert parse_config(make_published(config, rope_layers)) == config


@pytest.mark.parametrize("config", [SCOUT, MAVERICK, TINY], ids=["scout", "maverick", "tiny"])
def test_formatted_config_parses_to_the_same_config(config):
    config = dataclasses.replace(config, patch_id=7)
    assert parse_config(json.loads(json.dumps(format_config(config)))) == config
    text_only = dataclasses.replace(config, vision=None, patch_id=None)
    assert parse_config(json.loads(json.dumps(format_config(text_only)))) == text_only


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_published_and_transformers_5_styles_parse_to_the_same_config(kind):
    published = parse_config(weights.tiny_config(kind))
    assert parse_config(weights.tiny_config(kind, style="transformers5")) == published


def test_text_only_config_is_parsed():
    raw = weights.tiny_config("scout")
    multimodal, text_only = parse_config(raw), parse_config(weights.text_only(raw))
    assert (
        text_only.text == multimodal.text
        and text_only.vision is None
        and text_only.patch_id is None
    )
    assert text_only.eos_ids == multimodal.eos_ids == (2, 3)


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
def test_unsupported_text_value_is_refused_by_key(raw, key, value, says):
    raw["text_config"][key] = value
    with pytest.raises(ConfigError, match=says.replace("[", r"\[").replace(".", r"\.")):
        parse_config(raw)


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
def test_unsupported_vision_value_is_refused_by_key(raw, key, value, says):
    raw["vision_config"][key] = value
    with pytest.raises(ConfigError, match=says):
        parse_config(raw)


def test_other_model_type_is_refused():
    with pytest.raises(ConfigError, match=r"model_type is 'llama': l4jax computes Llama 4 only"):
        parse_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match="model_type is None"):
        parse_config({})


def test_missing_key_is_named(raw):
    del raw["text_config"]["hidden_size"]
    with pytest.raises(ConfigError, match=r"text_config\.hidden_size is missing"):
        parse_config(raw)


def test_missing_or_malformed_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        load_config(tmp_path)


def test_quantization_config_does_not_change_the_model(raw):
    raw["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert parse_config(raw) == SCOUT
