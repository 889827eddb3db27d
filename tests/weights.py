"""Tiny Llama 4 checkpoints made from a seed, without torch.

The goldens in ``tests/golden`` store no weights; this module makes them from the seed. The oracle
assigns them to the Hugging Face model by name; l4jax's tests write them as safetensors under the
published names and load them like published files.

Every value is exact in bfloat16, so checkpoints in ``F32`` and ``BF16`` hold the same numbers and
share one golden.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Kind = Literal["scout", "maverick"]
Style = Literal["published", "transformers5"]
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, np.ndarray]

BEGIN_OF_IMAGE_ID, END_OF_IMAGE_ID, PATCH_ID = 300, 301, 302
TILE_X_SEPARATOR_ID, TILE_Y_SEPARATOR_ID, IMAGE_ID = 303, 304, 305
FIRST_SPECIAL_ID = 300  # prompts draw their text from 4 .. 299

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDENS = tuple(
    f"{kind}-{chunk}-{prompt}"
    for kind in ("scout", "maverick")
    for chunk in (8, 32)
    for prompt in ("text", "image")
)

_PREFIX = "language_model."  # before the decoder's names in multimodal checkpoints


def tiny_config(kind: Kind, *, style: Style = "published", **overrides: Any) -> dict[str, Any]:
    """Make the ``config.json`` of a tiny model that crosses every boundary.

    Args:
      kind: ``scout``: every layer MoE, qk norm, RoPE scaling with low == high == 1.
        ``maverick``: every second layer MoE and other layers dense (of another width), no qk norm,
        no RoPE scaling.
      style: ``published`` as in the published checkpoints (``rope_scaling``, ``torch_dtype``,
        ``no_rope_layers: []``); ``transformers5`` as ``save_pretrained`` writes it
        (``rope_parameters``, ``dtype``, ``layer_types``, ``moe_layers``).
      **overrides: keys of ``text_config``, as in the published style; or ``vision_config={...}``
        with its keys.

    There are five layers by default: a complete group of four, and an incomplete one. With
    ``floor_scale`` 8, temperature tuning starts at position 7. With
    ``original_max_position_embeddings`` 16 and ``rope_theta`` 500, RoPE scaling changes all but
    the highest frequencies.
    """
    text, vision = _tiny_text(kind), _tiny_vision()
    for changes, section in ((overrides.pop("vision_config", {}), vision), (overrides, text)):
        if unknown := sorted(set(changes) - set(section)):
            raise KeyError(f"no such key in the tiny config: {', '.join(unknown)}")
        section.update(changes)
    config: dict[str, Any] = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": BEGIN_OF_IMAGE_ID,
        "eoi_token_index": END_OF_IMAGE_ID,
        "image_token_index": PATCH_ID,
        "model_type": "llama4",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0.dev0",
        "vision_config": vision,
    }
    return config if style == "published" else _as_transformers5(config)


def _tiny_text(kind: Kind) -> dict[str, Any]:
    is_scout = kind == "scout"
    return {
        "attention_bias": False,
        "attention_chunk_size": 8,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "floor_scale": 8,
        "head_dim": 8 if is_scout else 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1 if is_scout else 2,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "max_position_embeddings": 4096,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 16,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 5,
        "num_key_value_heads": 8,
        "num_local_experts": 4,
        "output_router_logits": False,
        "pad_token_id": 319,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
            "rope_type": "llama3",
        }
        if is_scout
        else None,
        "rope_theta": 500.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": is_scout,
        "vocab_size": 320,
    }


def _tiny_vision() -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 64,
        "image_size": 56,
        "initializer_range": 0.02,
        "intermediate_size": 256,  # 4 * hidden_size, the adapter's input width
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 8,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 48,
    }


def text_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the config of the text model alone, as in a ``Llama4ForCausalLM`` checkpoint."""
    return {"architectures": ["Llama4ForCausalLM"], **config["text_config"]}


def _as_transformers5(config: dict[str, Any]) -> dict[str, Any]:
    text = dict(config["text_config"])
    layers = range(text["num_hidden_layers"])
    rope = text.pop("rope_scaling") or {"rope_type": "default"}
    text["rope_parameters"] = {**rope, "rope_theta": text.pop("rope_theta")}
    text["dtype"] = text.pop("torch_dtype")
    text["no_rope_layers"] = text["no_rope_layers"] or [int((i + 1) % 4 != 0) for i in layers]
    text["no_rope_layer_interval"] = 4
    kinds = ("full_attention", "chunked_attention")
    text["layer_types"] = [kinds[uses_rope] for uses_rope in text["no_rope_layers"]]
    step = text["interleave_moe_layer_step"]
    text["moe_layers"] = list(range(step - 1, text["num_hidden_layers"], step))
    text["tie_word_embeddings"] = False
    vision = {**config["vision_config"], "dtype": config["torch_dtype"]}
    vision["rope_parameters"] = {"rope_theta": vision.pop("rope_theta"), "rope_type": "default"}
    return {
        **{key: value for key, value in config.items() if key != "torch_dtype"},
        "dtype": config["torch_dtype"],
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "vision_config": vision,
    }


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Compute name -> shape of every tensor of a checkpoint with this config, of either style.

    Experts are fused, ``[E, in, out]``, as in the published bfloat16 checkpoints. With a text-only
    config (``model_type`` ``llama4_text``), names have no prefix ``language_model.``.
    """
    if config["model_type"] == "llama4_text":
        return _text_shapes(config)
    text, vision = config["text_config"], config["vision_config"]
    shapes = _vision_shapes(vision)
    projector = (text["hidden_size"], vision["vision_output_dim"])
    shapes["multi_modal_projector.linear_1.weight"] = projector
    shapes |= {_PREFIX + name: shape for name, shape in _text_shapes(text).items()}
    return shapes


def _text_shapes(text: Mapping[str, Any]) -> Shapes:
    width, head_dim, vocab = text["hidden_size"], text["head_dim"], text["vocab_size"]
    queries, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    experts, step = text["num_local_experts"], text["interleave_moe_layer_step"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(text["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[layer + "self_attn.q_proj.weight"] = (queries, width)
        shapes[layer + "self_attn.k_proj.weight"] = (keys, width)
        shapes[layer + "self_attn.v_proj.weight"] = (keys, width)
        shapes[layer + "self_attn.o_proj.weight"] = (width, queries)
        feed_forward, inner = layer + "feed_forward.", text["intermediate_size_mlp"]
        if (i + 1) % step == 0:
            inner = text["intermediate_size"]
            shapes[feed_forward + "experts.gate_up_proj"] = (experts, width, 2 * inner)
            shapes[feed_forward + "experts.down_proj"] = (experts, inner, width)
            shapes[feed_forward + "router.weight"] = (experts, width)
            feed_forward += "shared_expert."
        shapes[feed_forward + "gate_proj.weight"] = (inner, width)
        shapes[feed_forward + "up_proj.weight"] = (inner, width)
        shapes[feed_forward + "down_proj.weight"] = (width, inner)
        shapes[layer + "input_layernorm.weight"] = (width,)
        shapes[layer + "post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocab, width)
    return shapes


def _vision_shapes(vision: Mapping[str, Any]) -> Shapes:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    shapes: Shapes = {
        "class_embedding": (width,),
        "positional_embedding_vlm": (patches + 1, width),
        "patch_embedding.linear.weight": (width, vision["num_channels"] * patch * patch),
    }
    linears = {f"self_attn.{x}_proj": (width, width) for x in "qkvo"}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    norms = ["layernorm_pre", "layernorm_post"]
    for i in range(vision["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        norms += [layer + "input_layernorm", layer + "post_attention_layernorm"]
        for name, (out_width, in_width) in linears.items():
            shapes[f"{layer}{name}.weight"] = (out_width, in_width)
            shapes[f"{layer}{name}.bias"] = (out_width,)
    for name in norms:
        shapes[name + ".weight"] = shapes[name + ".bias"] = (width,)
    shapes["vision_adapter.mlp.fc1.weight"] = (vision["projector_input_dim"], inner)
    output = vision["projector_output_dim"]
    shapes["vision_adapter.mlp.fc2.weight"] = (output, output)
    return {"vision_model." + name: shape for name, shape in shapes.items()}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    """Draw float32 tensors whose values depend on the seed and the tensor's name only.

    The prefix ``language_model.`` does not count, so the text-only checkpoint of a seed has the
    decoder weights of the multimodal one. No value hides a wrong implementation: norm weights
    scatter around 1, biases are not 0, attention is far from uniform.
    """
    return {name: _random_tensor(name, shape, seed) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # RandomState, not default_rng: NumPy guarantees that its numbers never change.
    name = name.removeprefix(_PREFIX)
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    values = random.standard_normal(shape)
    if name.endswith("norm.weight") or ("layernorm_" in name and name.endswith(".weight")):
        values = 1 + 0.25 * values
    elif name.endswith(".bias"):
        values *= 0.2
    elif not name.endswith("embed_tokens.weight") and "_embedding" not in name.rsplit(".", 1)[-1]:
        is_fused_expert = len(shape) == 3
        values *= _gain(name) / np.sqrt(shape[1 if is_fused_expert else -1])
    # By way of float32: ml_dtypes rounded float64 twice before 0.7.0, and once since.
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def _gain(name: str) -> float:
    """Choose the standard deviation of outputs for inputs of standard deviation 1."""
    if name == "lm_head.weight":
        return 4.0  # spreads the logits, so that the two best tokens are seldom close
    if "router" in name:
        return 3.0  # separates the experts' scores
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return 1.5
    return 1.2


def write_checkpoint(
    folder: Path | str,
    config: Mapping[str, Any],
    seed: int,
    *,
    dtype: Literal["F32", "BF16"] = "F32",
    shards: int = 1,
    fused: bool = True,
) -> None:
    """Write ``config.json`` and the safetensors of ``random_tensors`` in the published layout.

    Args:
      folder: made if it does not exist.
      config: of ``tiny_config`` or ``text_only``.
      seed: of the weights.
      dtype: of every stored tensor. The values do not depend on it.
      shards: 1 gives ``model.safetensors``; more give ``model-00001-of-0000N.safetensors`` and the
        index. Tensors of a layer may be in different files.
      fused: whether experts are one ``[E, in, out]`` tensor, or one ``[out, in]`` matrix per expert
        and projection, named as in quantized checkpoints.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = random_tensors(tensor_shapes(config), seed)
    if not fused:
        tensors = unfuse_experts(tensors)
    if dtype == "BF16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    write_shards(folder, tensors, shards)


def write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    """Write ``model.safetensors``, or several shards and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        shard = {str(name): tensors[str(name)] for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def unfuse_experts(tensors: Tensors) -> Tensors:
    """Unfuse ``experts.gate_up_proj [E, in, 2 out]``: ``experts.K.gate_proj.weight [out, in]``."""
    unfused: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 3:
            unfused[name] = tensor
            continue
        layer, projection = name.rsplit(".", 1)
        for k, matrix in enumerate(tensor.transpose(0, 2, 1)):
            parts = {projection: matrix}
            if projection == "gate_up_proj":
                gate, up = np.split(matrix, 2)  # gate is the first half of the outputs
                parts = {"gate_proj": gate, "up_proj": up}
            for part, values in parts.items():
                unfused[f"{layer}.{k}.{part}.weight"] = np.ascontiguousarray(values)
    return unfused


def checksum(tensors: Mapping[str, np.ndarray]) -> int:
    """Compute a checksum of all weights, by which a golden identifies its weights."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), value)
    return value


def random_ids(length: int, seed: int) -> np.ndarray:
    """Draw a prompt of text ids, int32 ``[T]``."""
    return np.random.RandomState(seed).randint(4, FIRST_SPECIAL_ID, length).astype(np.int32)


def random_pixels(tiles: int, seed: int, *, image_size: int = 56) -> np.ndarray:
    """Draw normalized pixels, float32 ``[I, C, image_size, image_size]`` in [-1, 1]."""
    shape = (tiles, 3, image_size, image_size)
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def image_ids(rows: int, columns: int, *, tokens_per_tile: int = 4) -> np.ndarray:
    """Make the int32 ids of one image, in the order of the published processor.

    There are ``rows * columns`` tiles and, if that is more than one, the global tile last.
    """
    tile = [PATCH_ID] * tokens_per_tile
    ids = [BEGIN_OF_IMAGE_ID]
    if rows * columns > 1:
        for _ in range(rows):
            for column in range(columns):
                ids += tile + ([TILE_X_SEPARATOR_ID] if column < columns - 1 else [])
            ids.append(TILE_Y_SEPARATOR_ID)
    return np.array([*ids, IMAGE_ID, *tile, END_OF_IMAGE_ID], np.int32)


class Golden(NamedTuple):
    """The reference's results for one prompt: see ``scripts/write_goldens.py``."""

    config: dict[str, Any]  # published style
    weights_seed: int
    ids: np.ndarray  # int32 [T]
    pixels: np.ndarray | None  # float32 [I, C, Y, X]
    image_features: np.ndarray | None  # float32 [patch ids in the prompt, D]
    rows: np.ndarray  # int32 [rows]: the positions that logits holds, all chunk boundaries included
    logits: np.ndarray  # float32 [rows, V]
    greedy_tokens: np.ndarray  # int32 [steps]: the tokens after the prompt
    greedy_margins: np.ndarray  # float32 [steps]: best logit minus second best at each step
    greedy_last_logits: np.ndarray  # float32 [V]: the logits of the last token


def read_golden(name: str) -> Golden:
    """Read one of ``GOLDENS``; its weights are ``write_checkpoint(.., config, weights_seed)``.

    Raises:
      ValueError: this module no longer makes the golden's weights.
    """
    with np.load(GOLDEN_FOLDER / f"{name}.npz") as file:
        stored = {key: file[key] for key in file.files}
    config, seed = json.loads(str(stored["config"])), int(stored["weights_seed"])
    if checksum(random_tensors(tensor_shapes(config), seed)) != int(stored["weights_checksum"]):
        raise ValueError(
            f"golden {name} belongs to other weights than tests/weights.py makes now; "
            "write it again: python -m scripts.write_goldens"
        )
    tiles, pixels_seed = int(stored["tiles"]), int(stored["pixels_seed"])
    return Golden(
        config=config,
        weights_seed=seed,
        pixels=random_pixels(tiles, pixels_seed) if tiles else None,
        image_features=stored["image_features"] if tiles else None,
        **{key: stored[key] for key in Golden._fields if key in stored and key not in _NOT_ARRAYS},
    )


_NOT_ARRAYS = ("config", "weights_seed", "pixels", "image_features")
