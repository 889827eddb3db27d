"""Checks of a tokenizer against the model that it comes with.

A tokenizer of another model encodes and decodes without an error, and the answers are nonsense.
"""

import re
from pathlib import Path

from l4jax.config import Config
from l4jax.json_file import quote
from l4jax.text.image import IMAGE_TOKENS, PATCH
from l4jax.text.tokenizer import Tokenizer, TokenizerError


def check_tokenizer(tokenizer: Tokenizer, config: Config, folder: Path) -> None:
    """Hold a checkpoint's tokenizer against its model.

    Args:
        tokenizer: of the checkpoint.
        config: of the model.
        folder: of both, for messages.

    Raises:
        TokenizerError: the tokenizer has more tokens than the model has embeddings; an id of the
            model's config is another token; or the chat template writes tokens that do not exist.
    """
    file, way_out = folder / "tokenizer.json", "take all files from one repository."
    if tokenizer.vocab_size > config.text.vocab:
        raise TokenizerError(
            f"{file} has ids up to {tokenizer.vocab_size - 1}, and vocab_size in config.json is "
            f"{config.text.vocab}: they belong to different models; {way_out}"
        )
    for name, token in tokenizer.special_tokens_map.items():
        if name != "pad_token" and tokenizer.backend.token_to_id(token) is None:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: {name} is {quote(token)}, which {file.name} "
                f"lacks; {way_out}"
            )
    expected = {"bos_token_id": (config.bos_id, tokenizer.special_tokens_map.get("bos_token"))}
    if config.vision is not None:
        for token in IMAGE_TOKENS:
            if token not in tokenizer.special_ids:
                raise TokenizerError(f"{file} lacks {token}, a token of images; {way_out}")
        expected["image_token_index"] = config.patch_id, PATCH
    for key, (token_id, token) in expected.items():
        if token_id is None or token is None or tokenizer.backend.token_to_id(token) == token_id:
            continue
        raise TokenizerError(
            f"{folder / 'config.json'}: {key} is {token_id}, and {file.name} gives {token} the id "
            f"{tokenizer.backend.token_to_id(token)}; {way_out}"
        )
    for token_id in config.eos_ids:
        if not tokenizer.is_special(token_id):
            token = tokenizer.backend.id_to_token(token_id)
            found = "has no such token" if token is None else f"has {quote(token)} there"
            raise TokenizerError(
                f"{folder / 'config.json'} or generation_config.json: eos_token_id has {token_id}, "
                f"and {file.name} {found}: name the ids of special tokens that end a turn."
            )
    _check_template(tokenizer, folder)


def _check_template(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse a chat template that is no Jinja, or writes special tokens that do not exist."""
    from jinja2 import Environment, TemplateSyntaxError

    # transformers adds the tag `generation`, which marks text for training.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.chat_template or "")
    where = f"the chat template in {folder} (chat_template.jinja or tokenizer_config.json)"
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"{where} is not Jinja: line {error.lineno}: {error.message}; download it again."
        ) from None
    except RecursionError:
        raise TokenizerError(f"{where} is nested too deeply: download it again.") from None
    for token in re.findall(
        r"<\|[A-Za-z0-9_]+\|>", re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    ):
        if token not in tokenizer.special_ids:
            raise TokenizerError(
                f"{where} writes {token}, and tokenizer.json has no such special token; "
                "take all files from one repository."
            )
