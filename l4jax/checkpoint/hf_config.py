# pyright: strict
"""Hugging Face's `config.json`: read into a `Config`, and written from one.

Every key of the file is accounted for: it is read, or must hold the one value that l4jax computes,
or is known to change nothing when serving. An unknown key is taken at a value that means "off".
At any other value it raises an error that names it, since it may change what the model computes.
"""

import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from l4jax.config import Config, ConfigError, RopeScaling, TextConfig, VisionConfig
from l4jax.json_file import quote, read_object, read_object_if_present

log = logging.getLogger(__name__)

MAX_INTEGER = 2**31 - 1  # of sizes and counts
MAX_LAYERS = 1024  # 21 times Scout's; the loader's tables grow with layers and experts
MAX_EXPERTS = 4096  # 32 times Maverick's

# Keys that change nothing when serving: provenance of the file, and settings of training.
_IGNORED = (
    "architectures",
    "_name_or_path",
    "transformers_version",
    "torch_dtype",  # the loader reads each tensor's own dtype
    "dtype",
    "use_cache",
    "_attn_implementation_autoset",
    "_attn_implementation",
    "attn_implementation",
    "quantization_config",  # the loader reads formats and scales off the tensors
    "for_llm_compressor",  # a quantizer's layout of experts, which the tensors' names show
    "initializer_range",
    "router_aux_loss_coef",
    "output_router_logits",
    "router_jitter_noise",  # noise on the router's input, in training
    "attention_dropout",
    "projector_dropout",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "problem_type",
    "id2label",
    "label2id",
    "ignore_keys_at_rope_validation",
    # Written by transformers 4.51 and earlier versions.
    "attn_implementation_autoset",
    "_attn_implementation_internal",
    "auto_map",
    "cache_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "keys_to_ignore_at_inference",
    "model_max_length",
    "pretraining_tp",
    "tf_legacy_loss",
    "tokenizer_class",
    "torchscript",
    "use_bfloat16",
    "task_specific_params",
    "prefix",
    # Generation settings, which transformers 4 also wrote into config.json. generation_config.json
    # is where a server reads them.
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
# Names of keys that tools add to describe the file; other values of them are noted once.
_PROVENANCE = re.compile(
    r"_|(.*_)?(version|author|license|date|hash|commit|url|repo|note|comment|description)s?$"
    r"|(axolotl|trl|wandb|training)_|(model_(name|id|path)|tags)$"
)
_KNOWN_PROVENANCE = re.compile(r"unsloth_|transformers\.js_config$|quantization_config$")
QUANTIZERS = ("compressed-tensors", "modelopt")  # values of quant_method


def load_config(folder: str | Path) -> Config:
    """Read `folder/config.json`, and the EOS ids of `generation_config.json`, which add to its own.

    Raises:
        ConfigError: the file is missing, is not JSON, or describes a model that l4jax does not
            compute.
    """
    path = Path(folder) / "config.json"
    if not path.exists() and any(Path(folder).glob("*.gguf")):
        raise ConfigError(
            f"{folder} holds GGUF files, which l4jax does not read: give the folder of a Hugging "
            "Face checkpoint, and quantize it with --quantization int4."
        )
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist: give the folder of a Hugging Face Llama 4 checkpoint."
        )
    raw = read_object(path, ConfigError)
    try:
        _check_quantization(raw.get("quantization_config"))
        config = parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    more = _load_generation_eos_ids(Path(folder), config.text.vocab)
    return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more))))


def _check_quantization(config: Any) -> None:
    """Refuse quantizers whose files l4jax does not read.

    The tensors of the others say how they are quantized, and are checked as they are read.
    """
    if not isinstance(config, Mapping):
        if config is not None:
            raise ConfigError(f"quantization_config is {quote(config)}: it must be an object.")
        return
    keys = cast(Mapping[str, Any], config)
    method = keys.get("quant_method", "compressed-tensors")
    if method not in QUANTIZERS:
        raise ConfigError(
            f"quantization_config.quant_method is {quote(method)}: l4jax reads "
            f"{' and '.join(QUANTIZERS)}; or take the BF16 checkpoint with --quantization int4."
        )
    if keys.get("transform_config"):
        raise ConfigError(
            "quantization_config.transform_config rotates activations, which l4jax does not "
            "compute: take a checkpoint that was quantized without transforms."
        )


def _load_generation_eos_ids(folder: Path, vocab: int) -> tuple[int, ...]:
    """Read the EOS ids of `generation_config.json`; a missing file has none."""
    path = folder / "generation_config.json"
    value = read_object_if_present(path, ConfigError).get("eos_token_id")
    try:
        return _parse_ids(value, "eos_token_id", vocab)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: Any) -> Config:
    """Parse the content of a `config.json`, of a multimodal or a text-only model.

    Raises:
        ConfigError: naming the key and the value that l4jax does not compute.
    """
    keys = _Keys(raw, "")
    model_type = keys.take("model_type", None)
    if model_type == "llama4_text":
        text, eos_ids, bos_id, pad_id = _parse_text(raw, "")
        return Config(text, None, bos_id, eos_ids, pad_id, None)
    if model_type != "llama4":
        raise ConfigError(
            f"model_type is {quote(model_type)}: "
            "l4jax computes Llama 4 only, 'llama4' or 'llama4_text'."
        )
    text_raw, vision_raw = keys.take("text_config"), keys.take("vision_config", None)
    text, eos_ids, bos_id, pad_id = _parse_text(text_raw, "text_config.")
    vision = _parse_vision(vision_raw) if vision_raw is not None else None
    patch_raw = keys.take("image_token_index", None), keys.take("image_token_id", None)
    patch_id = next((value for value in patch_raw if value is not None), 200092)
    # The tokenizer has the ids that surround an image: see l4jax.text.image.
    keys.ignore("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")
    eos_ids = _parse_ids(keys.take("eos_token_id", None), "eos_token_id", text.vocab) or eos_ids
    bos_id = _parse_id(keys.take("bos_token_id", None), "bos_token_id", text.vocab, bos_id)
    pad_id = _parse_pad_id(keys, "", text.vocab, pad_id)
    if vision is not None:
        patch_id = _parse_id(patch_id, "image_token_index", text.vocab, None)
    keys.require("tie_word_embeddings", False)
    _require_causal(keys)
    keys.ignore(*_IGNORED)
    keys.finish()
    return Config(
        text=text,
        vision=vision,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=pad_id,
        patch_id=patch_id if vision is not None else None,
    )


def format_config(config: Config) -> dict[str, Any]:
    """Format a config as the content of a `config.json`, in the published style.

    `parse_config` is the inverse. `quantization_config` is left to the writer of the weights.
    """
    text = _format_text(config)
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "image_token_index": config.patch_id,
        "text_config": text,
        "vision_config": _format_vision(config.vision),
    }


def _format_text(config: Config) -> dict[str, Any]:
    text, scaling = config.text, None
    if text.rope_scaling is not None:
        scaling = {
            "factor": text.rope_scaling.factor,
            "low_freq_factor": text.rope_scaling.low_freq_factor,
            "high_freq_factor": text.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": text.rope_scaling.original_max_positions,
            "rope_type": "llama3",
        }
    return {
        "model_type": "llama4_text",
        "vocab_size": text.vocab,
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "num_local_experts": text.experts,
        "num_experts_per_tok": 1,
        "intermediate_size": text.expert_width,
        "intermediate_size_mlp": text.dense_width,
        "interleave_moe_layer_step": text.moe_interval,
        "no_rope_layers": [int(not text.is_nope(i)) for i in range(text.layers)],
        "attention_chunk_size": text.chunk,
        "max_position_embeddings": text.max_positions,
        "rope_theta": text.rope_theta,
        "rope_scaling": scaling,
        "use_qk_norm": text.has_qk_norm,
        "attn_temperature_tuning": text.has_temperature_tuning,
        "floor_scale": text.floor_scale,
        "attn_scale": text.attn_scale,
        "rms_norm_eps": text.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }


def _format_vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.hidden,
        "image_size": vision.tile,
        "patch_size": vision.patch,
        "num_channels": vision.channels,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
        "projector_input_dim": vision.adapter_width,
        "projector_output_dim": vision.adapter_width,
        "vision_output_dim": vision.adapter_width,
        "rope_theta": vision.rope_theta,
        "norm_eps": vision.norm_eps,
        "hidden_act": "gelu",
        "multi_modal_projector_bias": False,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


class _Keys:
    """The keys of a JSON object that are not accounted for yet."""

    def __init__(self, raw: Any, prefix: str):
        if not isinstance(raw, Mapping):
            name = prefix.rstrip(".") or "config.json"
            raise ConfigError(f"{name} holds {quote(raw)}, not an object.")
        self._left, self._prefix = dict(cast(Mapping[str, Any], raw)), prefix

    def take(self, key: str, *default: Any) -> Any:
        """Take the value of a key, which must be present if there is no default."""
        if key not in self._left and not default:
            raise ConfigError(f"{self._prefix}{key} is missing from config.json.")
        return self._left.pop(key, *default)

    def peek(self, key: str) -> Any:
        """Return the value of a key, which stays; None if it is absent."""
        return self._left.get(key)

    def take_positive(
        self, key: str, *default: Any, dtype: type = int, largest: int = MAX_INTEGER
    ) -> Any:
        """Take a positive number; an int where `dtype` is int, even if it is written as 8.0."""
        value = self.take(key, *default)
        if not _is_number(value, dtype) or value <= 0:
            raise ConfigError(
                f"{self._prefix}{key} is {quote(value)}, not a positive {dtype.__name__}."
            )
        bounds = (1, largest) if dtype is int else (1e-30, 1e30)  # float32 has these
        if not bounds[0] <= value <= bounds[1]:
            raise ConfigError(
                f"{self._prefix}{key} is {quote(value)}: "
                f"l4jax computes values from {bounds[0]} to {bounds[1]}."
            )
        return dtype(value)

    def take_flag(self, key: str, default: bool) -> bool:
        """Take a flag. transformers 4 wrote some as counts, of which all but 0 mean true."""
        value = self.take(key, default)
        if not isinstance(value, bool) and not (type(value) is int and value >= 0):
            raise ConfigError(f"{self._prefix}{key} is {quote(value)}, neither true nor false.")
        return bool(value)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse a key that is present with a value other than those that l4jax computes."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            expected = " or ".join(json.dumps(a) for a in allowed)
            raise ConfigError(
                f"{self._prefix}{key} is {quote(value)}, and l4jax computes only {expected}."
            )

    def ignore(self, *keys: str) -> None:
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Refuse keys that are left: an unread key may change what the model computes."""
        for key, value in self._left.items():
            is_off = value is None or value is False or value in ("", [], {})
            if is_off or _KNOWN_PROVENANCE.match(key):
                continue
            if not _PROVENANCE.match(key):
                raise ConfigError(
                    f"{self._prefix}{quote(key)[1:-1]} is {quote(value)}: a key that l4jax does "
                    "not know; remove it if it changes nothing in the forward pass."
                )
            _warn_once(self._prefix + key)


@functools.cache
def _warn_once(key: str) -> None:
    log.warning("config.json: %s is a key that l4jax does not know, and is ignored.", key)


def _is_number(value: Any, dtype: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return dtype is float or isinstance(value, int) or (math.isfinite(value) and value % 1 == 0)


def _parse_text(
    raw: Any, prefix: str
) -> tuple[TextConfig, tuple[int, ...], int | None, int | None]:
    """Parse the decoder's config; also its EOS ids, BOS id and pad id."""
    keys = _Keys(raw, prefix)
    keys.require("model_type", "llama4_text")
    keys.require("hidden_act", "silu")
    keys.require("attention_bias", False)
    keys.require("tie_word_embeddings", False)
    keys.require("num_experts_per_tok", 1)
    layers = keys.take_positive("num_hidden_layers", largest=MAX_LAYERS)
    heads = keys.take_positive("num_attention_heads")
    width = keys.take_positive("hidden_size")
    chunk = keys.take_positive("attention_chunk_size", 8192)
    moe_interval = keys.take_positive("interleave_moe_layer_step", 1)
    nope_interval = _parse_nope_interval(keys, layers)
    theta, scaling = _parse_rope(keys)
    if keys.peek("num_key_value_heads") is None:
        keys.ignore("num_key_value_heads")
    kv_heads = keys.take_positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{prefix}num_attention_heads is {heads}: {kv_heads} kv heads cannot share them."
        )
    if keys.peek("head_dim") is None:
        keys.ignore("head_dim")
    head_dim = keys.take_positive("head_dim", width // heads)
    if head_dim % 2:
        raise ConfigError(
            f"{prefix}head_dim is {head_dim}: RoPE rotates pairs, so it must be even."
        )
    config = TextConfig(
        vocab=keys.take_positive("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=keys.take_positive("num_local_experts", 16, largest=MAX_EXPERTS),
        expert_width=keys.take_positive("intermediate_size"),
        dense_width=keys.take_positive("intermediate_size_mlp", 16384),
        moe_interval=moe_interval,
        nope_interval=nope_interval,
        chunk=chunk,
        max_positions=keys.take_positive("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        has_qk_norm=keys.take_flag("use_qk_norm", True),
        has_temperature_tuning=keys.take_flag("attn_temperature_tuning", True),
        floor_scale=keys.take_positive("floor_scale", 8192),
        attn_scale=keys.take_positive("attn_scale", 0.1, dtype=float),
        norm_eps=keys.take_positive("rms_norm_eps", 1e-5, dtype=float),
    )
    keys.require("moe_layers", None, [i for i in range(layers) if config.is_moe(i)])
    layer_types = ["full_attention", "chunked_attention"]
    keys.require("layer_types", None, [layer_types[not config.is_nope(i)] for i in range(layers)])
    names = [f"{prefix}{name}" for name in ("eos_token_id", "bos_token_id")]
    eos_ids = _parse_ids(keys.take("eos_token_id", None), names[0], config.vocab)
    bos_id = _parse_id(keys.take("bos_token_id", None), names[1], config.vocab, None)
    pad_id = _parse_pad_id(keys, prefix, config.vocab, None)
    _require_causal(keys)
    keys.ignore(*_IGNORED)
    keys.finish()
    return config, eos_ids, bos_id, pad_id


def _parse_nope_interval(keys: _Keys, layers: int) -> int:
    """Parse the layers without RoPE: the page pool's groups need them at a fixed interval."""
    interval = keys.take_positive("no_rope_layer_interval", keys.take("nope_layer_interval", 4))
    uses_rope = keys.take("no_rope_layers", None)  # 1 where RoPE IS used; empty is the default
    if uses_rope in (None, []):
        return interval
    listed = cast(list[Any], uses_rope if isinstance(uses_rope, list) else [])
    if len(listed) == layers:
        # Without any NoPE layer, the published interval only names the grouping.
        found = listed.index(0) + 1 if 0 in listed else layers + 1
        if listed == [int((i + 1) % found != 0) for i in range(layers)]:
            return found
    raise ConfigError(
        f"no_rope_layers is {quote(uses_rope)}: "
        "l4jax computes layers without RoPE at a fixed interval only."
    )


def _parse_rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """Parse `rope_theta` and `rope_scaling`; in transformers 5, `rope_parameters` holds both."""
    parameters = keys.take("rope_parameters", None)
    scaling = keys.take("rope_scaling", None)
    raw = parameters if parameters is not None else scaling
    rope = _Keys({} if raw is None else raw, "rope_scaling.")
    theta = keys.take_positive("rope_theta", rope.take("rope_theta", 500000.0), dtype=float)
    rope_type = rope.take("rope_type", rope.take("type", "default"))
    rope.ignore("type")
    if rope_type == "default":
        rope.finish()
        return theta, None
    if rope_type != "llama3":
        raise ConfigError(
            f"rope_scaling.rope_type is {quote(rope_type)}: l4jax computes 'llama3' or none."
        )
    parsed = RopeScaling(
        factor=rope.take_positive("factor", dtype=float),
        low_freq_factor=rope.take_positive("low_freq_factor", dtype=float),
        high_freq_factor=rope.take_positive("high_freq_factor", dtype=float),
        original_max_positions=rope.take_positive("original_max_position_embeddings"),
    )
    rope.finish()
    return theta, parsed


def _parse_vision(raw: Any) -> VisionConfig:
    keys = _Keys(raw, "vision_config.")
    keys.require("model_type", "llama4_vision_model")
    keys.require("hidden_act", "gelu")
    keys.require("multi_modal_projector_bias", False)
    keys.require("pixel_shuffle_ratio", 0.5)
    keys.require("vision_feature_layer", -1)
    keys.require("vision_feature_select_strategy", "default")
    # The reference's layer norms use 1e-5 whatever this key says.
    keys.require("norm_eps", 1e-5)
    rope_raw = keys.take("rope_parameters", None)
    rope = _Keys({} if rope_raw is None else rope_raw, "vision_config.rope_parameters.")
    rope.require("rope_type", "default")
    theta = keys.take_positive("rope_theta", rope.take("rope_theta", 10000.0), dtype=float)
    rope.finish()
    width = keys.take_positive("hidden_size")
    heads = keys.take_positive("num_attention_heads")
    hidden = keys.take_positive("intermediate_size")
    tile = keys.take_positive("image_size")
    patch = keys.take_positive("patch_size")
    shuffle = 2
    if tile % (patch * shuffle):
        raise ConfigError(
            f"vision_config.image_size is {tile}: "
            f"it must be a multiple of {shuffle} patches of {patch}."
        )
    if hidden != width * shuffle**2:
        # The adapter's first matrix is declared with this width in the published layout.
        raise ConfigError(
            f"vision_config.intermediate_size is {hidden}: it must be 4 * hidden_size, {4 * width}."
        )
    if width % (4 * heads):
        raise ConfigError(
            f"vision_config.hidden_size is {width}: "
            "2-D RoPE needs heads of a multiple of 4 elements."
        )
    config = VisionConfig(
        width=width,
        layers=keys.take_positive("num_hidden_layers", largest=MAX_LAYERS),
        heads=heads,
        hidden=hidden,
        tile=tile,
        patch=patch,
        channels=keys.take_positive("num_channels", 3),
        shuffle=shuffle,
        adapter_width=keys.take_positive("vision_output_dim"),
        rope_theta=theta,
        norm_eps=1e-5,
    )
    keys.require("projector_input_dim", config.adapter_width)
    keys.require("projector_output_dim", config.adapter_width)
    _require_causal(keys)
    # transformers 4 wrote its defaults into every nested config.
    keys.ignore("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    keys.ignore(*_IGNORED)
    keys.finish()
    return config


def _require_causal(keys: _Keys) -> None:
    """Refuse transformers 4's keys of other architectures, unless they are off."""
    keys.require("is_decoder", False, True, None)
    keys.require("add_cross_attention", False, None)
    keys.require("cross_attention_hidden_size", None)
    keys.require("tie_encoder_decoder", False, None)
    keys.require("pruned_heads", {}, None)


def _parse_ids(value: Any, key: str, vocab: int) -> tuple[int, ...]:
    """Parse a token id, a list of them, or null for none."""
    each = cast(list[Any], value if isinstance(value, list) else [value])
    if value is None:
        return ()
    for token in each:
        if isinstance(token, bool) or not _is_number(token, int) or not 0 <= token < vocab:
            raise ConfigError(
                f"{key} is {quote(value)}: token ids of this model are 0 to {vocab - 1}."
            )
    return tuple(int(token) for token in each)


def _parse_id(value: Any, key: str, vocab: int, default: int | None) -> int | None:
    """Parse a token id; null is the default."""
    if isinstance(value, list):
        raise ConfigError(f"{key} is {quote(cast(Any, value))}, not one token id.")
    return next(iter(_parse_ids(value, key, vocab)), default)


def _parse_pad_id(keys: _Keys, prefix: str, vocab: int, default: int | None) -> int | None:
    """Parse the pad id. Nothing is padded when serving, so -1 is allowed to mean none."""
    value = keys.take("pad_token_id", None)
    return None if value == -1 else _parse_id(value, f"{prefix}pad_token_id", vocab, default)
