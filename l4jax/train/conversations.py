"""Conversations in a file of JSON lines, as documents whose answers are learned, in batches.

A line is `{"messages": [...]}` in OpenAI's chat form, and may have `tools`. What the assistant says
is learned, from the end of the header that opens its turn to the token that ends it.
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
from l4jax.train.batches import FAILURES, SHORTEST, Packed, Recipe, fill, find_room, pack
from l4jax.train.documents import CHAT, Document

_KEYS = ("messages", "tools")


class DataError(ValueError):
    """A line that cannot be learned from; says which one, and why."""


def read_documents(
    path: Path, tokenizer: Tokenizer, processor: ImageProcessor | None, longest: int
) -> list[Document]:
    """The conversations of a file, one a line; empty lines are passed over.

    Args:
        path: of the file. A picture is a part `{"type": "image_url", "image_url": {"url":
            "data:..."}}`, or `{"type": "image", "image": "PATH"}` with a path from the file's
            folder.
        tokenizer, processor: the model's; no processor for one without vision.
        longest: tokens of a conversation, at most.

    Raises:
        DataError: naming the line.
    """
    documents = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            document = spell(_read_line(line, path.parent), tokenizer, processor)
        except (PromptError, DataError) as error:
            raise DataError(f"{where}: {error}") from error
        count = len(document.token_T)
        if not SHORTEST <= count <= longest:
            raise DataError(
                f"{where}: it has {count} tokens, and {SHORTEST} to {longest} are learned from: "
                "cut it, or take longer rows."
            )
        documents.append(document)
    if not documents:
        raise DataError(f"{path} holds no conversation: give it one a line, as JSON.")
    return documents


def _read_line(line: str, folder: Path) -> dict[str, Any]:
    """A line's fields; paths of pictures are taken from a folder."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"it is not JSON ({error}).") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
        raise DataError('it is not like {"messages": [...]}.')
    if strange := sorted(set(fields) - set(_KEYS)):
        raise DataError(f"it has {strange[0]!r}, and l4jax reads {' and '.join(_KEYS)}: remove it.")
    for message in fields["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            source = part.get("image") if isinstance(part, dict) else None
            if isinstance(source, str) and source[:5].lower() != "data:":
                part["image"] = folder / source
    return fields


def spell(
    fields: dict[str, Any], tokenizer: Tokenizer, processor: ImageProcessor | None
) -> Document:
    """The tokens of a conversation, its answers' with the weight 1.

    Args:
        fields: of a line. An answer whose `weight` is 0 is not learned.
        tokenizer, processor: the model's.

    Raises:
        PromptError: for messages that are no prompt.
        DataError: where nothing is to be learned, or where an answer begins or ends is not to be
            told from the template.
    """
    messages = fields["messages"]

    def render(count: int, opens: bool) -> Prompt:
        return render_chat(
            tokenizer,
            processor,
            [_forget_weight(message) for message in messages[:count]],
            add_generation_prompt=opens,
            tools=fields.get("tools"),
        )

    whole = render(len(messages), False)
    weight_T = np.zeros(len(whole.token_ids), np.float32)
    for at, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if at == 0:
            raise DataError("it begins with the assistant: begin with a user or system message.")
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"messages[{at}].weight is {message['weight']!r}: it is 0 or 1.")
        opened, closed = render(at, True).token_ids, render(at + 1, False).token_ids
        count = len(opened)
        if closed[:count] != opened or whole.token_ids[: len(closed)] != closed:
            raise DataError(
                f"messages[{at}]: where it begins is not to be told: the chat template must write "
                "an answer behind what opens one, and no answer may begin with a space or a line's "
                "end."
            )
        weight_T[count : len(closed)] = message.get("weight", 1)
    if not weight_T.any():
        raise DataError("it has no answer of the assistant: there is nothing to learn.")
    return _make_document(whole, weight_T, tokenizer, processor)


def _forget_weight(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if key != "weight"}


def _make_document(
    prompt: Prompt, weight_T: np.ndarray, tokenizer: Tokenizer, processor: ImageProcessor | None
) -> Document:
    token_T = np.array(prompt.token_ids, np.int32)
    nothing_T = np.full(len(token_T), -1, np.int32)
    side = processor.tile if processor else 0
    feature_T, tiles_ICYX = nothing_T, np.zeros((0, 3, side, side), np.uint8)
    if prompt.images and processor:
        is_patch_T = token_T == tokenizer.token_id(PATCH)
        feature_T = np.where(is_patch_T, np.cumsum(is_patch_T) - 1, -1).astype(np.int32)
        normal_ICYX = np.concatenate([tiles.pixels_ICHW for tiles in prompt.images])
        # Each value is one of 256 that ascend: back to which one, as batches hold them.
        channels = enumerate(processor.levels_C256)
        levels = [np.searchsorted(levels_256, normal_ICYX[:, c]) for c, levels_256 in channels]
        tiles_ICYX = np.stack(levels, axis=1).astype(np.uint8)
    return Document(
        kind=CHAT,
        token_T=token_T,
        weight_T=weight_T,
        feature_T=feature_T,
        seen_T=nothing_T,
        tiles_ICYX=tiles_ICYX,
    )


def draw_places(
    documents: Sequence[Document], recipe: Recipe
) -> Iterator[list[tuple[int, Document]]]:
    """Which document stands where in each batch, without end.

    Each pass over the data has an order of its own, and every document once; what finds no room in
    a batch is in the next one. A batch does not reach from one pass into the next.
    """
    rng = random.Random(f"{recipe.seed} conversations")
    while True:
        waiting = rng.sample(documents, len(documents))[::-1]
        while waiting:
            places: list[tuple[int, Document]] = []
            left: list[Document] = []
            filled, tiles = [0] * (recipe.rows * recipe.length // recipe.chunk), 0
            while waiting and len(left) < FAILURES:
                document = waiting.pop()
                count = len(document.token_T)
                start = find_room(filled, count, recipe)
                if start is None or tiles + len(document.tiles_ICYX) > recipe.tiles:
                    left.append(document)
                    continue
                tiles += len(document.tiles_ICYX)
                fill(filled, start, count, recipe.chunk)
                places.append((start, document))
            waiting += left[::-1]
            yield places


def make_batches(documents: Sequence[Document], recipe: Recipe, start: int) -> Iterator[Packed]:
    """The batches of the steps from `start` on: the same, whatever was made before."""
    side = documents[0].tiles_ICYX.shape[-1]
    drawn = draw_places(documents, recipe)
    for step in range(recipe.steps):
        places = next(drawn)
        if step >= start:
            yield pack(places, recipe, side)


def count_tiles(documents: Sequence[Document], rows: int) -> int:
    """Tiles of a batch: four a row, or more where one document has more; none without pictures."""
    most = max(len(document.tiles_ICYX) for document in documents)
    return rows * max(4, -(-most // rows)) if most else 0
