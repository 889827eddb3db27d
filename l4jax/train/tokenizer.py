"""The bundled model's tokenizer: byte-level BPE trained on the training data, and a chat template.

Each digit is a token, so that numbers are read and added digit by digit. The vocabulary has all of
Llama 4's special tokens except the numbered reserved ones.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l4jax.testing.model import write_json, write_processor_configs
from l4jax.train import charts, tasks
from l4jax.train.splits import sample_from

# In the order of the real vocabulary.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
    "<|reasoning_thinking_start|>",
    "<|reasoning_thinking_end|>",
)
# Letters with a leading space; one digit; punctuation; line ends; spaces.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# Tool calls in Python syntax; turns as in Llama 4.
CHAT_TEMPLATE = """\
{%- macro show(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}
      {{- "<|image|>" if part.type == "image" else part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro write(value) -%}
  {%- if value is true -%}True
  {%- elif value is false -%}False
  {%- elif value is none -%}None
  {%- else -%}{{ value | tojson }}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if tools -%}
  {{- "<|header_start|>system<|header_end|>\\n\\nYou can call these functions:\\n" -}}
  {%- for tool in tools -%}{{ tool | tojson }}{{ "\\n" }}{%- endfor -%}
  {{- "<|eot|>" -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = "ipython" if message.role == "tool" else message.role -%}
  {{- "<|header_start|>" + role + "<|header_end|>\\n\\n" + show(message.content) -}}
  {%- if message.tool_calls -%}
    {{- "[" -}}
    {%- for call in message.tool_calls -%}
      {{- (", " if not loop.first else "") + call.function.name + "(" -}}
      {%- for name, value in call.function.arguments.items() -%}
        {{- (", " if not loop.first else "") + name + "=" + write(value) -}}
      {%- endfor -%}
      {{- ")" -}}
    {%- endfor -%}
    {{- "]" -}}
  {%- endif -%}
  {{- "<|eot|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|header_start|>assistant<|header_end|>\\n\\n" -}}
{%- endif -%}
"""


def train_tokenizer(
    folder: str | os.PathLike, *, vocab_size: int = 2048, examples: int = 4000, seed: int = 0
) -> dict[str, Any]:
    """Train the tokenizer and write it with its chat template in Hugging Face's layout.

    Args:
        folder: the output folder.
        vocab_size: bytes, merges and special tokens, which have the last ids.
        examples: of each kind of training data, to train on.
        seed: of the examples.

    Returns:
        The ids of the special tokens by their names without delimiters (`eot`, `patch`, ...).
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_list_texts(examples, random.Random(seed)), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    ids = {token.strip("<|>"): tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, ids["begin_of_text"])],
    )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}
    config = names | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    write_json(path / "special_tokens_map.json", names)
    write_json(path / "tokenizer_config.json", config)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_processor_configs(path, charts.TILE, charts.PATCH)
    return ids


def _list_texts(examples: int, rng: random.Random) -> Iterator[str]:
    """List training data as text. Roles and labels are frequent enough to become single tokens."""
    yield from tasks.read_prose()
    for _ in range(examples):
        yield "user\n\nassistant\n\nsystem\n\nipython\n\n" + tasks.TOOLS_INTRODUCED
        words = [word for group in charts.LABELS.values() for word in group.split()]
        yield " ".join(rng.sample(words, 12)) + "\n" + rng.choice(words)
        for make, arguments in (
            (tasks.make_chart_exchange, (1.0, 3)),
            (tasks.make_arithmetic, ()),
            (tasks.make_fact, ()),
            (tasks.make_tool_call, ()),
        ):
            yield tasks.format_text(sample_from("train", make, rng, *arguments))
