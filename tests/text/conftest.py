"""Fixtures of two tokenizers: a tiny one, and Llama 4's from the package `llama_models`."""

import ast
import importlib.util
from pathlib import Path

import pytest

from l4jax.testing import write_tokenizer
from l4jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture(scope="session")
def meta_folder() -> Path:
    """The folder of `llama_models.llama4`, located without an import (which may import torch)."""
    found = importlib.util.find_spec("llama_models")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llama-models is not installed; it carries the real tokenizer.model")
    return Path(found.submodule_search_locations[0]) / "llama4"


@pytest.fixture(scope="session")
def meta_tokens(meta_folder: Path) -> tuple[str, list[str]]:
    """Meta's split pattern and special tokens, in order."""
    return read_meta_tokenizer(meta_folder / "tokenizer.py")


@pytest.fixture(scope="session")
def real_folder(
    meta_folder: Path,
    meta_tokens: tuple[str, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Llama 4's tokenizer in Hugging Face layout, converted as the published one was."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern, special_tokens = meta_tokens
    converter = TikTokenConverter(
        vocab_file=str(meta_folder / "tokenizer.model"),
        pattern=pattern,
        extra_special_tokens=special_tokens,
    )
    tokenizer = converter.converted()
    bos = special_tokens[0]
    add_bos = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), add_bos]
    )
    folder = tmp_path_factory.mktemp("real-tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", '
        '"pad_token": "<|finetune_right_pad|>", "tokenizer_class": "PreTrainedTokenizer"}'
    )
    return folder


@pytest.fixture(scope="session")
def real(real_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(real_folder)


def read_meta_tokenizer(file: Path) -> tuple[str, list[str]]:
    """Read the split pattern and all 2048 special tokens from the constants of Meta's source."""
    tree = ast.parse(file.read_text())
    names = ("get_reserved_special_tokens", "LLAMA4_", "BASIC_SPECIAL_TOKENS")
    values: dict = {}
    pattern = ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            pattern = next(
                ast.literal_eval(item.value)
                for item in node.body
                if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "O200K_PATTERN"
            )
        is_wanted = isinstance(node, ast.FunctionDef | ast.Assign) and any(
            name in ast.unparse(node).split("=")[0] for name in names
        )
        if is_wanted:
            exec(compile(ast.Module([node], []), str(file), "exec"), values)
    tokens = values["BASIC_SPECIAL_TOKENS"] + values["LLAMA4_SPECIAL_TOKENS"]
    tokens += [f"<|reserved_special_token_{i}|>" for i in range(2048 - len(tokens))]
    return pattern, tokens
