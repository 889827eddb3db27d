"""What the model is: frozen, and strict about the `config.json` it is read from.

`Config.from_hf` accounts for every key of the file: a key is read, or has to hold the one value
that this code computes, or is known to change nothing when serving. Any other key is an error that
names it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A `config.json` that this code would compute wrongly, said in one sentence."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """llama3 scaling: low frequencies are divided by `factor`, high ones are left alone."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. Counts are plurals, sizes in elements, positions in tokens."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    expert_width: int
    dense_width: int
    moe_interval: int  # layer i is a mixture when (i + 1) % moe_interval == 0
    nope_interval: int  # layer i sees everything, without RoPE, when (i + 1) % nope_interval == 0
    chunk: int  # the other layers see their own aligned chunk of this many positions
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    has_qk_norm: bool
    has_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    norm_eps: float

    @property
    def queries(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    def is_nope(self, layer: int) -> bool:
        """Whether a layer attends to all positions, without RoPE (12 of Scout's 48)."""
        return (layer + 1) % self.nope_interval == 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts (every second one of Maverick's)."""
        return (layer + 1) % self.moe_interval == 0


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image encoder and its adapter. Sizes in pixels or elements."""

    width: int
    layers: int
    heads: int
    hidden: int
    tile: int
    patch: int
    channels: int
    shuffle: int  # patches per side that become one feature
    adapter_width: int
    rope_theta: float
    norm_eps: float

    @property
    def grid(self) -> int:
        """Patches per side of a tile."""
        return self.tile // self.patch

    @property
    def patches(self) -> int:
        """Patches of a tile, the class embedding not counted."""
        return self.grid**2

    @property
    def features(self) -> int:
        """Image tokens of a tile (144 in the published models)."""
        return (self.grid // self.shuffle) ** 2


@dataclasses.dataclass(frozen=True)
class Config:
    """A Llama 4: text, perhaps vision, and the ids that have a meaning."""

    text: TextConfig
    vision: VisionConfig | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    patch_id: int | None  # the token that an image feature replaces

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Config":
        """Read `folder/config.json`. Raises `ConfigError` where it is missing or not JSON, too."""
        path = Path(folder) / "config.json"
        try:
            return cls.from_hf(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: give the folder of a Hugging Face Llama 4 checkpoint."
            ) from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Config":
        """Build from the content of a Hugging Face `config.json`: the whole model's or the text
        model's.

        Raises `ConfigError`, naming the key, for anything that this code does not compute.
        """
        keys = _Keys(raw, "")
        kind = keys.take("model_type", None)
        if kind == "llama4_text":
            text, eos_ids, bos_id, pad_id = _read_text(raw, "")
            return cls(text, None, bos_id, eos_ids, pad_id, None)
        if kind != "llama4":
            raise ConfigError(
                f"model_type is {kind!r}: l4jax computes Llama 4 only, 'llama4' or 'llama4_text'."
            )
        text_raw, vision_raw = keys.take("text_config"), keys.take("vision_config", None)
        text, eos_ids, bos_id, pad_id = _read_text(text_raw, "text_config.")
        vision = _read_vision(vision_raw) if vision_raw is not None else None
        patch_id = keys.take("image_token_index", keys.take("image_token_id", 200092))
        # The ids around an image are text's: the tokenizer spells them (l4jax.text.image).
        keys.drop("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")
        eos_ids = _read_ids(keys.take("eos_token_id", None)) or eos_ids
        bos_id = keys.take("bos_token_id", bos_id)
        pad_id = keys.take("pad_token_id", pad_id)
        keys.require("tie_word_embeddings", False)
        keys.drop(*_INERT)
        keys.finish()
        return cls(
            text=text,
            vision=vision,
            bos_id=bos_id,
            eos_ids=eos_ids,
            pad_id=pad_id,
            patch_id=patch_id if vision is not None else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `from_hf` reads back as this, in the published style.

        How weights are quantized is not in it: that belongs to whoever writes them.
        """
        t, v = self.text, self.vision
        scaling = None
        if t.rope_scaling is not None:
            scaling = {
                "factor": t.rope_scaling.factor,
                "low_freq_factor": t.rope_scaling.low_freq_factor,
                "high_freq_factor": t.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": t.rope_scaling.original_max_positions,
                "rope_type": "llama3",
            }
        text = {
            "model_type": "llama4_text",
            "vocab_size": t.vocab,
            "hidden_size": t.width,
            "num_hidden_layers": t.layers,
            "num_attention_heads": t.heads,
            "num_key_value_heads": t.kv_heads,
            "head_dim": t.head_dim,
            "num_local_experts": t.experts,
            "num_experts_per_tok": 1,
            "intermediate_size": t.expert_width,
            "intermediate_size_mlp": t.dense_width,
            "interleave_moe_layer_step": t.moe_interval,
            "no_rope_layers": [int(not t.is_nope(i)) for i in range(t.layers)],
            "attention_chunk_size": t.chunk,
            "max_position_embeddings": t.max_positions,
            "rope_theta": t.rope_theta,
            "rope_scaling": scaling,
            "use_qk_norm": t.has_qk_norm,
            "attn_temperature_tuning": t.has_temperature_tuning,
            "floor_scale": t.floor_scale,
            "attn_scale": t.attn_scale,
            "rms_norm_eps": t.norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids),
            "pad_token_id": self.pad_id,
        }
        if v is None:
            return {"architectures": ["Llama4ForCausalLM"], **text}
        vision = {
            "model_type": "llama4_vision_model",
            "hidden_size": v.width,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "intermediate_size": v.hidden,
            "image_size": v.tile,
            "patch_size": v.patch,
            "num_channels": v.channels,
            "pixel_shuffle_ratio": 1 / v.shuffle,
            "projector_input_dim": v.adapter_width,
            "projector_output_dim": v.adapter_width,
            "vision_output_dim": v.adapter_width,
            "rope_theta": v.rope_theta,
            "norm_eps": v.norm_eps,
            "hidden_act": "gelu",
            "multi_modal_projector_bias": False,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        }
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "image_token_index": self.patch_id,
            "text_config": text,
            "vision_config": vision,
        }

    def replace_text(self, **changes: Any) -> "Config":
        """A copy with fields of the text part changed."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, **changes))


# Keys that change nothing when serving: how the file came about, and what only training reads.
_INERT = (
    "architectures",
    "_name_or_path",
    "transformers_version",
    "torch_dtype",  # the loader reads each tensor's own dtype
    "dtype",
    "use_cache",
    "_attn_implementation_autoset",
    "_attn_implementation",
    "attn_implementation",
    "quantization_config",  # each tensor tells its own format, and its scales
    "for_llm_compressor",  # how a quantiser unrolled the experts; names.py reads it off the tensors
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
)


class _Keys:
    """A mapping that remembers which of its keys were accounted for."""

    def __init__(self, raw: Any, prefix: str):
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"{prefix.rstrip('.') or 'config.json'} holds {raw!r}, not an object."
            )
        self._left, self._prefix = dict(raw), prefix

    def take(self, key: str, *default: Any) -> Any:
        """The value of a key, which counts as read; without a default, the key must be there."""
        if key not in self._left and not default:
            raise ConfigError(f"{self._prefix}{key} is missing from config.json.")
        return self._left.pop(key, *default)

    def number(self, key: str, *default: Any, kind: type = int) -> Any:
        value = self.take(key, *default)
        right = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and value == kind(value)
        )
        if not right or value <= 0:
            raise ConfigError(f"{self._prefix}{key} is {value!r}, not a positive {kind.__name__}.")
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if value not in (True, False):  # 4 of the published copies write 1 or 0
            raise ConfigError(f"{self._prefix}{key} is {value!r}, neither true nor false.")
        return bool(value)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse a key that is present with a value other than those that we compute."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            wanted = " or ".join(json.dumps(a) for a in allowed)
            raise ConfigError(
                f"{self._prefix}{key} is {value!r}, and l4jax computes only {wanted}."
            )

    def drop(self, *keys: str) -> None:
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Refuse what is left: a key that nobody read may change what the model computes."""
        if self._left:
            key, value = next(iter(self._left.items()))
            raise ConfigError(f"{self._prefix}{key} is {value!r}: a key that l4jax does not know.")


def _read_text(raw: Any, prefix: str) -> tuple[TextConfig, tuple[int, ...], int | None, int | None]:
    keys = _Keys(raw, prefix)
    keys.require("model_type", "llama4_text")
    keys.require("hidden_act", "silu")
    keys.require("attention_bias", False)
    keys.require("tie_word_embeddings", False)
    keys.require("num_experts_per_tok", 1)
    layers = keys.number("num_hidden_layers")
    heads = keys.number("num_attention_heads")
    width = keys.number("hidden_size")
    chunk = keys.number("attention_chunk_size", 8192)
    moe_interval = keys.number("interleave_moe_layer_step", 1)
    nope_interval = _read_nope_interval(keys, layers)
    theta, scaling = _read_rope(keys)
    config = TextConfig(
        vocab=keys.number("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=keys.number("num_key_value_heads", heads),
        head_dim=keys.number("head_dim", width // heads),
        experts=keys.number("num_local_experts", 16),
        expert_width=keys.number("intermediate_size"),
        dense_width=keys.number("intermediate_size_mlp", 16384),
        moe_interval=moe_interval,
        nope_interval=nope_interval,
        chunk=chunk,
        max_positions=keys.number("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        has_qk_norm=keys.flag("use_qk_norm", True),
        has_temperature_tuning=keys.flag("attn_temperature_tuning", True),
        floor_scale=keys.number("floor_scale", 8192),
        attn_scale=keys.number("attn_scale", 0.1, kind=float),
        norm_eps=keys.number("rms_norm_eps", 1e-5, kind=float),
    )
    moe_layers = [i for i in range(layers) if config.is_moe(i)]
    keys.require("moe_layers", None, moe_layers)
    kinds = ["full_attention" if config.is_nope(i) else "chunked_attention" for i in range(layers)]
    keys.require("layer_types", None, kinds)
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"{prefix}num_attention_heads is {heads}: {config.kv_heads} kv heads cannot share them."
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"{prefix}head_dim is {config.head_dim}: RoPE turns pairs, so it must be even."
        )
    eos_ids = _read_ids(keys.take("eos_token_id", None))
    bos_id, pad_id = keys.take("bos_token_id", None), keys.take("pad_token_id", None)
    keys.drop(*_INERT)
    keys.finish()
    return config, eos_ids, bos_id, pad_id


def _read_nope_interval(keys: _Keys, layers: int) -> int:
    """Layers without RoPE must stand at a fixed interval: the page pool's groups rest on it."""
    interval = keys.number("no_rope_layer_interval", keys.take("nope_layer_interval", 4))
    uses_rope = keys.take("no_rope_layers", None)  # 1 where RoPE IS used; empty is the default
    if not uses_rope:
        return interval
    for candidate in range(1, layers + 2):
        if list(uses_rope) == [int((i + 1) % candidate != 0) for i in range(layers)]:
            # With no NoPE layer at all the published interval only names the grouping.
            return candidate
    raise ConfigError(
        f"no_rope_layers is {uses_rope!r}: "
        "l4jax computes layers without RoPE at a fixed interval only."
    )


def _read_rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters` that holds both."""
    parameters = keys.take("rope_parameters", None)
    scaling = keys.take("rope_scaling", None)
    rope = _Keys(parameters if parameters is not None else scaling or {}, "rope_scaling.")
    theta = keys.number("rope_theta", rope.take("rope_theta", 500000.0), kind=float)
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.drop("type")
    if kind == "default":
        rope.finish()
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"rope_scaling.rope_type is {kind!r}: l4jax computes 'llama3' or none.")
    read = RopeScaling(
        factor=rope.number("factor", kind=float),
        low_freq_factor=rope.number("low_freq_factor", kind=float),
        high_freq_factor=rope.number("high_freq_factor", kind=float),
        original_max_positions=rope.number("original_max_position_embeddings"),
    )
    rope.finish()
    return theta, read


def _read_vision(raw: Any) -> VisionConfig:
    keys = _Keys(raw, "vision_config.")
    keys.require("model_type", "llama4_vision_model")
    keys.require("hidden_act", "gelu")
    keys.require("multi_modal_projector_bias", False)
    keys.require("pixel_shuffle_ratio", 0.5)
    keys.require("vision_feature_layer", -1)
    keys.require("vision_feature_select_strategy", "default")
    # The reference's layer norms hold 1e-5 whatever this key says.
    keys.require("norm_eps", 1e-5)
    rope = _Keys(keys.take("rope_parameters", None) or {}, "vision_config.rope_parameters.")
    rope.require("rope_type", "default")
    theta = keys.number("rope_theta", rope.take("rope_theta", 10000.0), kind=float)
    rope.finish()
    config = VisionConfig(
        width=keys.number("hidden_size"),
        layers=keys.number("num_hidden_layers"),
        heads=keys.number("num_attention_heads"),
        hidden=keys.number("intermediate_size"),
        tile=keys.number("image_size"),
        patch=keys.number("patch_size"),
        channels=keys.number("num_channels", 3),
        shuffle=2,
        adapter_width=keys.number("vision_output_dim"),
        rope_theta=theta,
        norm_eps=1e-5,
    )
    keys.require("projector_input_dim", config.adapter_width)
    keys.require("projector_output_dim", config.adapter_width)
    keys.drop(*_INERT)
    keys.finish()
    if config.tile % (config.patch * config.shuffle):
        raise ConfigError(
            f"vision_config.image_size is {config.tile}: "
            f"it must be a multiple of {config.shuffle} patches of {config.patch}."
        )
    if config.hidden != config.width * config.shuffle**2:
        # The adapter's first matrix is declared with this width in the published layout.
        raise ConfigError(
            f"vision_config.intermediate_size is {config.hidden}: "
            f"it must be 4 * hidden_size, {4 * config.width}."
        )
    if config.width % (4 * config.heads):
        raise ConfigError(
            f"vision_config.hidden_size is {config.width}: "
            "2-D RoPE needs heads of a multiple of 4 elements."
        )
    return config


def _read_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


_SCOUT_TEXT = TextConfig(
    vocab=202048,
    width=5120,
    layers=48,
    heads=40,
    kv_heads=8,
    head_dim=128,
    experts=16,
    expert_width=8192,
    dense_width=16384,
    moe_interval=1,
    nope_interval=4,
    chunk=8192,
    max_positions=10485760,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192),
    has_qk_norm=True,
    has_temperature_tuning=True,
    floor_scale=8192,
    attn_scale=0.1,
    norm_eps=1e-5,
)
SCOUT = Config(
    text=_SCOUT_TEXT,
    vision=VisionConfig(
        width=1408,
        layers=34,
        heads=16,
        hidden=5632,
        tile=336,
        patch=14,
        channels=3,
        shuffle=2,
        adapter_width=4096,
        rope_theta=10000.0,
        norm_eps=1e-5,
    ),
    bos_id=200000,
    eos_ids=(200001, 200007, 200008),
    pad_id=200018,
    patch_id=200092,
)
MAVERICK = SCOUT.replace_text(
    experts=128, moe_interval=2, max_positions=1048576, rope_scaling=None, has_qk_norm=False
)
# Llama 4 in miniature, with every kind of layer and a chunk that short texts cross.
TINY = Config(
    text=TextConfig(
        vocab=512,
        width=64,
        layers=5,
        heads=16,
        kv_heads=8,
        head_dim=16,
        experts=4,
        expert_width=64,
        dense_width=128,
        moe_interval=1,
        nope_interval=4,
        chunk=32,
        max_positions=32768,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(16.0, 1.0, 1.0, 32),
        has_qk_norm=True,
        has_temperature_tuning=True,
        floor_scale=32,
        attn_scale=0.1,
        norm_eps=1e-5,
    ),
    vision=VisionConfig(
        width=32,
        layers=2,
        heads=8,
        hidden=128,
        tile=336,
        patch=14,
        channels=3,
        shuffle=2,
        adapter_width=64,
        rope_theta=10000.0,
        norm_eps=1e-5,
    ),
    bos_id=None,
    eos_ids=(),
    pad_id=None,
    patch_id=None,
)
