# pyright: strict
"""The configuration of a Llama 4 model, frozen: its sizes, its kinds of layers, its special ids.

`l4jax.checkpoint.load_config` reads one from a checkpoint's `config.json`.
"""

import dataclasses
from typing import Any

INT4_GROUP = 128  # neighbors that share an int4 scale, as in the published checkpoints


class ConfigError(ValueError):
    """A configuration that l4jax would compute wrongly: one sentence that names key and value."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """llama3 RoPE scaling: low frequencies are divided by `factor`, high ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. Counts are plurals, sizes are in elements, positions in tokens."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    expert_width: int
    dense_width: int
    moe_interval: int  # layer i is a mixture of experts when (i + 1) % moe_interval == 0
    nope_interval: int  # layer i is global, without RoPE, when (i + 1) % nope_interval == 0
    chunk: int  # positions of an aligned attention chunk, to which local layers are confined
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    has_qk_norm: bool
    has_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    norm_eps: float

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0, "kv heads share the query heads evenly"
        assert self.head_dim % 2 == 0, "RoPE rotates pairs of elements"

    @property
    def queries(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    def is_nope(self, layer: int) -> bool:
        """Whether a layer attends to all positions, without RoPE (12 of Scout's 48)."""
        return (layer + 1) % self.nope_interval == 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts (every second layer of Maverick)."""
        return (layer + 1) % self.moe_interval == 0


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image encoder and its adapter. Sizes are in pixels or elements."""

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

    def __post_init__(self) -> None:
        assert self.tile % (self.patch * self.shuffle) == 0, "features tile the image"
        assert self.hidden == self.width * self.shuffle**2, "the adapter reads shuffled patches"
        assert self.width % (4 * self.heads) == 0, "2-D RoPE rotates pairs for rows and columns"

    @property
    def grid(self) -> int:
        """Patches per side of a tile."""
        return self.tile // self.patch

    @property
    def patches(self) -> int:
        """Patches of a tile, without the class embedding."""
        return self.grid**2

    @property
    def features(self) -> int:
        """Image tokens of a tile (144 in the published models)."""
        return (self.grid // self.shuffle) ** 2


@dataclasses.dataclass(frozen=True)
class Config:
    """A Llama 4 model: the decoder, the image encoder if it has one, and its special ids."""

    text: TextConfig
    vision: VisionConfig | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    patch_id: int | None  # the token that an image feature replaces

    def replace_text(self, **changes: Any) -> "Config":
        """Copy with fields of the decoder changed."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, **changes))

    def replace_vision(self, **changes: Any) -> "Config":
        """Copy with fields of the image encoder changed."""
        assert self.vision is not None
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, **changes))


SCOUT = Config(
    text=TextConfig(
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
    ),
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
# Scout in miniature, with every kind of layer and an attention chunk that short prompts cross.
# The special ids are those of the tokenizer that is written with it: see `l4jax.testing`.
TINY = dataclasses.replace(
    SCOUT.replace_text(
        vocab=512,
        width=64,
        layers=5,
        heads=16,
        head_dim=16,
        experts=4,
        expert_width=64,
        dense_width=128,
        chunk=32,
        max_positions=32768,
        rope_scaling=RopeScaling(16.0, 1.0, 1.0, 32),
        floor_scale=32,
    ).replace_vision(width=32, layers=2, heads=8, hidden=128, adapter_width=64),
    bos_id=None,
    eos_ids=(),
    pad_id=None,
    patch_id=None,
)
