"""A complete model on disk: config, tokenizer, weights."""

import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jax.tree_util import tree_flatten_with_path

from l4jax import checkpoint
from l4jax.checkpoint.names import export_parameter
from l4jax.checkpoint.safetensors import write_safetensors
from l4jax.config import TINY, Config
from l4jax.model import declare_parameters
from l4jax.testing.quantized import Scheme, quantize_tensors

# The special tokens that l4jax reads, in the order of Llama 4's vocabulary.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
)

# Words that become single tokens while the vocabulary has room; their prefixes become tokens, too.
COMMON_WORDS = """
the and ing of to a in is that it for was on are with as be this have from or by not but you all
can had one what when there use said each which she how their will up other out many then them so
some would make like him into time has look two more write see number way could people than first
water been call who its now find long down day did get come may part sky blue why because light air
"""

# Written for this package, with the structure of Llama 4's template.
CHAT_TEMPLATE = """\
{%- macro show(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}
      {{- "<|image|>" if part.type == "image" else part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if tools -%}
  {{- "<|header_start|>system<|header_end|>\\n\\nYou can call these functions. " -}}
  {{- "To call one, answer with JSON: its name and its parameters.\\n" -}}
  {%- for tool in tools -%}{{ tool | tojson }}{{ "\\n" }}{%- endfor -%}
  {{- "<|eot|>" -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = "ipython" if message.role == "tool" else message.role -%}
  {{- "<|header_start|>" + role + "<|header_end|>\\n\\n" + show(message.content) -}}
  {%- for call in message.tool_calls or [] -%}
    {{- {"name": call.function.name, "parameters": call.function.arguments} | tojson -}}
  {%- endfor -%}
  {{- "<|eot|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|header_start|>assistant<|header_end|>\\n\\n" -}}
{%- endif -%}
"""


def write_model(
    folder: str | os.PathLike,
    config: Config = TINY,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    quantization: Scheme | None = None,
    **choices: Any,
) -> Config:
    """Write a complete model with random weights in Hugging Face's layout.

    The folder appears complete or not at all, so two processes may write it at the same time.

    Args:
        folder: of the model; an existing one is replaced.
        config: the sizes; special ids are replaced by those of the tokenizer that is written.
        seed: of the weights.
        dtype: of the weights, "bfloat16" or "float32".
        quantization: None, or the scheme in which weights are stored, byte for byte as published:
            "maverick-fp8", "fp8-dynamic", "w4a16", "nvfp4", "modelopt-fp8" or "modelopt-nvfp4".
            Other weights are in bfloat16 then.
        **choices: of the scheme, arguments of `quantize_tensors`: `group_size`, ...

    Returns:
        The config that was written.

    Raises:
        ValueError: the scheme is unknown, or does not divide the config's sizes.
    """
    if choices and quantization is None:
        raise TypeError(f"{', '.join(choices)}: only for a quantization, and none is given.")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        config = _write_model(scratch, config, seed, dtype, quantization, choices)
        if folder.exists():
            shutil.rmtree(folder)
        scratch.replace(folder)
    except OSError:
        # If another process wrote the same folder first, that one is used.
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return config


def _write_model(
    folder: Path,
    config: Config,
    seed: int,
    dtype: str,
    quantization: Scheme | None,
    choices: dict[str, Any],
) -> Config:
    ids = write_tokenizer(folder, vocab_size=config.text.vocab)
    config = dataclasses.replace(
        config,
        bos_id=ids["bos"],
        eos_ids=tuple(ids["eos"]),
        pad_id=ids["pad"],
        patch_id=ids["patch"] if config.vision else None,
    )
    if config.vision:
        write_processor_configs(folder, config.vision.tile, config.vision.patch)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": ids["eos"]}
    write_json(folder / "generation_config.json", sampling)
    shapes, _ = declare_parameters(config, dtype)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in tree_flatten_with_path(shapes)[0]:
        name = "/".join(key.key for key in path)
        tensors |= export_parameter(
            name, _draw(name, leaf.shape, seed).astype(leaf.dtype), has_vision=bool(config.vision)
        )
    raw = {**checkpoint.format_config(config), "torch_dtype": dtype}
    if quantization is not None:
        float32 = {name: values.astype(np.float32) for name, values in tensors.items()}
        tensors, description = quantize_tensors(float32, quantization, **choices)
        raw |= {"torch_dtype": "bfloat16", "quantization_config": description}
    write_json(folder / "config.json", raw)
    write_safetensors(folder / "model.safetensors", tensors)
    return config


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw weights that preserve the scale of activations at any width, and norms near 1."""
    # RandomState: numpy guarantees that its numbers never change.
    values = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(
        shape
    )
    if name.endswith("/scale"):
        return 1 + 0.1 * values
    if name.endswith("bias") or len(shape) == 1:
        return 0.1 * values
    if name.endswith("/embedding"):
        return values
    in_axes = 3 if name.endswith("attention/out") else 1
    return values / np.sqrt(np.prod(shape[-in_axes:]))


def write_tokenizer(folder: str | os.PathLike, *, vocab_size: int = 512) -> dict[str, Any]:
    """Write a small byte-level BPE tokenizer with Llama 4's special tokens and a chat template.

    Ids 0 to 255 are the bytes in order; merges for common English words follow, then the special
    tokens. The remaining ids below `vocab_size` have no token, as in Llama 4's vocabulary. The
    files are deterministic.

    Returns:
        The special ids: `bos`, `eos` (a list: end_of_text, eom, eot), `pad`, and one entry per
        special token, without its brackets (`eot`, `image_start`, `patch`, ...).

    Raises:
        ValueError: `vocab_size` is smaller than the bytes and the special tokens.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    from l4jax.text.tokenizer import byte_of_char

    room = vocab_size - 256 - len(SPECIAL_TOKENS)
    if room < 0:
        raise ValueError(
            f"vocab_size = {vocab_size} is too small; 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens need {vocab_size - room}."
        )
    vocab = {char: byte for char, byte in byte_of_char().items()}
    space = next(char for char, byte in vocab.items() if byte == ord(" "))
    merges = []
    for word in COMMON_WORDS.split():
        token = space
        for char in word:
            if token + char not in vocab and len(merges) < room:
                merges.append((token, char))
                vocab[token + char] = 256 + len(merges) - 1
            token += char
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(make_split_pattern()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {
        "bos_token": bos,
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
    }
    config = names | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10485760}
    write_json(path / "special_tokens_map.json", names)
    write_json(path / "tokenizer_config.json", config)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    ids = {token.strip("<|>"): tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return ids | {
        "bos": ids["begin_of_text"],
        "eos": [ids["end_of_text"], ids["eom"], ids["eot"]],
        "pad": ids["finetune_right_pad"],
    }


def make_split_pattern() -> str:
    """Make the regular expression that splits text before BPE in Llama 4's tokenizer.

    It matches words (with one preceding character and an English contraction), up to three digits,
    punctuation, ends of lines, spaces.
    """
    before = r"[^\r\n\p{L}\p{N}]?"
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    after = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    return "|".join(
        [
            f"{before}{upper}*{lower}+{after}",
            f"{before}{upper}+{lower}*{after}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


def write_processor_configs(folder: str | os.PathLike, image_size: int, patch_size: int) -> None:
    """Write `preprocessor_config.json` and `processor_config.json` like those of Llama 4."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    preprocessor = {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "device": None,
        "do_center_crop": None,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Llama4ImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        "input_data_format": None,
        "max_patches": 16,
        "processor_class": "Llama4Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "resize_to_max_canvas": False,
        "return_tensors": None,
        "size": {"height": image_size, "width": image_size},
    }
    processor = {
        "fake_image_token": "<|image|>",
        "image_token": "<|image|>",
        "patch_size": patch_size,
        "processor_class": "Llama4Processor",
    }
    write_json(path / "preprocessor_config.json", preprocessor)
    write_json(path / "processor_config.json", processor)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
