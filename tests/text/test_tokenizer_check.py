"""Laws of a tokenizer and its model: they belong together, or are refused before any weight."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l4jax.checkpoint import load_config
from l4jax.config import SCOUT, TINY, Config
from l4jax.engine.config import EngineConfig
from l4jax.inputs import InputProcessor
from l4jax.testing import SPECIAL_TOKENS, write_model
from l4jax.text.tokenizer import Tokenizer, TokenizerError
from l4jax.text.tokenizer_check import check_tokenizer

SMALL = TINY.replace_text(layers=1, experts=1).replace_vision(layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", SMALL)
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def load(folder: Path) -> InputProcessor:
    return InputProcessor.from_folder(folder, load_config(folder), EngineConfig(model=folder))


def remove_words(tokenizer: dict[str, Any]) -> None:
    """Remove the second half of the words, and the merges that make them."""
    model = tokenizer["model"]
    words = [token for token, i in model["vocab"].items() if i >= 256]
    lost = set(words[len(words) // 2 :])
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in lost}
    model["merges"] = [
        pair
        for pair in model["merges"]
        if not lost & {"".join(pair), *pair, "".join(pair).replace(" ", "")}
    ]


def test_tokenizer_of_its_model_is_taken(folder: Path) -> None:
    assert load(folder).eos_ids == load_config(folder).eos_ids


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(added_tokens=[]), r"tokenizer\.json"),
        (lambda raw: raw["added_tokens"].pop(3), r"tokenizer\.json"),
        (lambda raw: raw["added_tokens"].pop(), r"tokenizer\.json lacks <\|patch\|>"),
        (remove_words, r"bos_token_id is \d+, and tokenizer\.json gives <\|begin_of_text\|> the"),
    ],
    ids=["no added tokens", "one lost", "the last lost", "half the words"],
)
def test_tokenizer_that_lost_tokens_is_refused(folder: Path, change: Any, says: str) -> None:
    edit(folder / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=says):
        load(folder)


def test_added_tokens_that_the_config_gives_other_ids_are_refused(folder: Path) -> None:
    ids = {token: Tokenizer.from_folder(folder).token_id(token) for token in SPECIAL_TOKENS}
    listed = {str(i): {"content": token, "special": True} for token, i in ids.items()}
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(added_tokens_decoder=listed))
    load(folder)
    edit(folder / "tokenizer.json", remove_words)
    with pytest.raises(TokenizerError, match=r"added_tokens_decoder gives '<\|begin_of_text\|>'"):
        Tokenizer.from_folder(folder)


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(folder: Path) -> None:
    config = load_config(folder).replace_text(vocab=300)
    with pytest.raises(TokenizerError, match=r"vocab_size in config\.json is 300"):
        check_tokenizer(Tokenizer.from_folder(folder), config, folder)


def change_id(config: Config, **ids: Any) -> Config:
    return dataclasses.replace(config, **ids)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ({"bos_id": 7}, "bos_token_id is 7, and tokenizer.json gives <|begin_of_text|> the id"),
        ({"patch_id": 7}, "image_token_index is 7, and tokenizer.json gives <|patch|> the id"),
        ({"eos_ids": (101,)}, "eos_token_id has 101, and tokenizer.json has 'e' there"),
        ({"eos_ids": (511,)}, "eos_token_id has 511, and tokenizer.json has no such token"),
    ],
)
def test_id_of_another_token_is_refused(folder: Path, ids: dict[str, Any], says: str) -> None:
    config = change_id(load_config(folder), **ids)
    with pytest.raises(TokenizerError, match=re.escape(says)):
        check_tokenizer(Tokenizer.from_folder(folder), config, folder)


def test_token_of_the_template_that_does_not_exist_is_refused(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("{# <|im_start|> #}" + path.read_text())
    load(folder)
    path.write_text("<|im_start|>" + path.read_text())
    with pytest.raises(TokenizerError, match=r"writes <\|im_start\|>, and tokenizer\.json has no"):
        load(folder)


def test_template_that_is_no_jinja_is_refused(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    content = path.read_text()
    path.write_text("{% generation %}" + content + "{%- endgeneration -%}")
    load(folder)
    path.write_text(content[: len(content) // 2])
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja.* is not Jinja: line \d+: "):
        load(folder)


def test_named_token_that_does_not_exist_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(eos_token="</s>"))
    with pytest.raises(TokenizerError, match=r"eos_token is '</s>', which tokenizer\.json lacks"):
        load(folder)


def test_end_ids_are_those_of_both_files_or_else_the_tokenizers(folder: Path) -> None:
    eos_ids = load_config(folder).eos_ids
    config, generation = folder / "config.json", folder / "generation_config.json"
    edit(generation, lambda raw: raw.update(eos_token_id=eos_ids[2]))
    edit(config, lambda raw: raw["text_config"].update(eos_token_id=eos_ids[0]))
    assert load(folder).eos_ids == (eos_ids[0], eos_ids[2])
    edit(generation, lambda raw: raw.pop("eos_token_id"))
    edit(config, lambda raw: raw["text_config"].pop("eos_token_id"))
    assert load_config(folder).eos_ids == ()
    assert load(folder).eos_ids == (Tokenizer.from_folder(folder).token_id("<|eot|>"),)


def test_llama_4s_own_tokenizer_is_that_of_scout(real: Tokenizer, real_folder: Path) -> None:
    check_tokenizer(real, SCOUT, real_folder)
    with pytest.raises(TokenizerError, match="eos_token_id has 128009"):  # Llama 3's
        check_tokenizer(real, change_id(SCOUT, eos_ids=(128009,)), real_folder)


def test_tokenizer_saved_by_transformers_is_taken(folder: Path) -> None:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    whole = load(folder)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    GenerationConfig.from_pretrained(folder).save_pretrained(folder)
    again = load(folder)
    text = "Why is the sky blue?<|eot|>"
    assert again.tokenizer.encode(text) == whole.tokenizer.encode(text)
    assert again.tokenizer.special_tokens_map == whole.tokenizer.special_tokens_map
    assert again.tokenizer.chat_template == whole.tokenizer.chat_template
    assert (again.eos_ids, again.default_params) == (whole.eos_ids, whole.default_params)
