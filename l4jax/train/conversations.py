"""Chat datasets: conversations in JSON lines, encoded as documents and packed into batches.

A line is `{"messages": [...]}` in OpenAI's chat format, with optional `tools`. The loss covers the
assistant's messages, from the end of the header that opens the turn to the token that ends it.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.text.chat import Prompt, PromptError, render_chat
from l4jax.text.image import PATCH, ImageProcessor
from l4jax.text.tokenizer import Tokenizer
from l4jax.train.batches import (
    MAX_FAILURES,
    MIN_TOKENS,
    DataConfig,
    PackedBatch,
    find_space,
    pack,
    reserve,
)
from l4jax.train.documents import CHAT, Document

_KEYS = ("messages", "tools")


class DataError(ValueError):
    """A line that cannot be trained on; names the line and the cause."""


def read_documents(
    path: Path, tokenizer: Tokenizer, processor: ImageProcessor | None, longest: int
) -> list[Document]:
    """Read the conversations of a file, one per line; empty lines are skipped.

    Args:
        path: the file. An image is a part `{"type": "image_url", "image_url": {"url":
            "data:..."}}`, or `{"type": "image", "image": "PATH"}` with a path relative to the
            file's folder.
        tokenizer, processor: the model's; no processor for a model without vision.
        longest: limit on the tokens of a conversation.

    Raises:
        DataError: a line cannot be trained on; names the line.
    """
    documents = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {cause}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            document = encode_conversation(_read_line(line, path.parent), tokenizer, processor)
        except (PromptError, DataError) as error:
            raise DataError(f"{where}: {error}") from error
        count = len(document.token_T)
        if not MIN_TOKENS <= count <= longest:
            raise DataError(
                f"{where}: it has {count} tokens, and {MIN_TOKENS} to {longest} are allowed: "
                "shorten it, or use longer rows."
            )
        documents.append(document)
    if not documents:
        raise DataError(f"{path} holds no conversation: write one per line, as JSON.")
    return documents


def _read_line(line: str, folder: Path) -> dict[str, Any]:
    """Parse a line's fields; image paths are relative to `folder`."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON ({error}).") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
        raise DataError('it is not like {"messages": [...]}.')
    if unknown := sorted(set(fields) - set(_KEYS)):
        raise DataError(f"it has {unknown[0]!r}, and l4jax reads {' and '.join(_KEYS)}: remove it.")
    for message in fields["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            source = part.get("image") if isinstance(part, dict) else None
            if isinstance(source, str) and source[:5].lower() != "data:":
                part["image"] = folder / source
    return fields


def encode_conversation(
    fields: dict[str, Any], tokenizer: Tokenizer, processor: ImageProcessor | None
) -> Document:
    """Encode a conversation; the tokens of its answers have the loss weight 1.

    Args:
        fields: the fields of a line. An answer with `weight` 0 is not trained on.
        tokenizer, processor: the model's.

    Raises:
        PromptError: the messages cannot be rendered.
        DataError: no answer to train on, or the template does not determine an answer's tokens.
    """
    messages = fields["messages"]

    def render(count: int, is_open: bool) -> Prompt:
        return render_chat(
            tokenizer,
            processor,
            [_remove_weight(message) for message in messages[:count]],
            add_generation_prompt=is_open,
            tools=fields.get("tools"),
        )

    whole = render(len(messages), False)
    weight_T = np.zeros(len(whole.token_ids), np.float32)
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise DataError("it begins with the assistant: begin with a user or system message.")
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"messages[{index}].weight is {message['weight']!r}: it is 0 or 1.")
        opened, closed = render(index, True).token_ids, render(index + 1, False).token_ids
        count = len(opened)
        if closed[:count] != opened or whole.token_ids[: len(closed)] != closed:
            raise DataError(
                f"messages[{index}]: its first token cannot be determined: the chat template must "
                "write an answer after the generation prompt, and no answer may begin with a space "
                "or a line break."
            )
        weight_T[count : len(closed)] = message.get("weight", 1)
    if not weight_T.any():
        raise DataError("it has no answer of the assistant: add one, or remove the line.")
    return _make_document(whole, weight_T, tokenizer, processor)


def _remove_weight(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if key != "weight"}


def _make_document(
    prompt: Prompt, weight_T: np.ndarray, tokenizer: Tokenizer, processor: ImageProcessor | None
) -> Document:
    token_T = np.array(prompt.token_ids, np.int32)
    none_T = np.full(len(token_T), -1, np.int32)
    side = processor.tile if processor else 0
    feature_T, tiles_ICYX = none_T, np.zeros((0, 3, side, side), np.uint8)
    if prompt.images and processor:
        is_patch_T = token_T == tokenizer.token_id(PATCH)
        feature_T = np.where(is_patch_T, np.cumsum(is_patch_T) - 1, -1).astype(np.int32)
        normal_ICYX = np.concatenate([tiles.pixels_ICHW for tiles in prompt.images])
        # The normalized values of the 256 levels ascend; recover the uint8 levels of batches.
        channels = enumerate(processor.levels_C256)
        levels = [np.searchsorted(levels_256, normal_ICYX[:, c]) for c, levels_256 in channels]
        tiles_ICYX = np.stack(levels, axis=1).astype(np.uint8)
    return Document(
        kind=CHAT,
        token_T=token_T,
        weight_T=weight_T,
        feature_T=feature_T,
        patch_target_T=none_T,
        tiles_ICYX=tiles_ICYX,
    )


def iterate_placements(
    documents: Sequence[Document], data: DataConfig
) -> Iterator[list[tuple[int, Document]]]:
    """Iterate without end over the documents of each batch and their first tokens' indices.

    Each epoch has its own order and every document once. A document without space in a batch moves
    to the next one. A batch does not cross an epoch's end.
    """
    rng = random.Random(f"{data.seed} conversations")
    while True:
        waiting = rng.sample(documents, len(documents))[::-1]
        while waiting:
            placements: list[tuple[int, Document]] = []
            deferred: list[Document] = []
            filled, tiles = [0] * (data.rows * data.length // data.chunk), 0
            while waiting and len(deferred) < MAX_FAILURES:
                document = waiting.pop()
                count = len(document.token_T)
                start = find_space(filled, count, data)
                if start is None or tiles + len(document.tiles_ICYX) > data.tiles:
                    deferred.append(document)
                    continue
                tiles += len(document.tiles_ICYX)
                reserve(filled, start, count, data.chunk)
                placements.append((start, document))
            waiting += deferred[::-1]
            yield placements


def make_batches(
    documents: Sequence[Document], data: DataConfig, start: int
) -> Iterator[PackedBatch]:
    """Iterate over the batches of the steps from `start` on; a batch depends on its step only."""
    side = documents[0].tiles_ICYX.shape[-1]
    batches = iterate_placements(documents, data)
    for step in range(data.steps):
        placements = next(batches)
        if step >= start:
            yield pack(placements, data, side)


def count_tiles(documents: Sequence[Document], rows: int) -> int:
    """Count the tiles of a batch: four per row, or more for one document; 0 without images."""
    largest = max(len(document.tiles_ICYX) for document in documents)
    return rows * max(4, -(-largest // rows)) if largest else 0
