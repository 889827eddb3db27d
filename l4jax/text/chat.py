"""Encode conversations and raw prompts as token ids and image tiles.

Text from outside cannot forge structure. In a conversation, `<|eot|>` and every other special token
inside a message, a tool or an argument is encoded as its characters. Meta's encoder does the same;
transformers offers it as `sanitize_control_tokens`. Only the chat template ends a turn.
The six image tokens are refused instead: a client that writes `<|image|>` in a message expects an
image there, and would silently get none.
A raw prompt (`encode_prompt`) is the caller's own program, and its special tokens count.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from l4jax.text.image import (
    IMAGE_PLACEHOLDER,
    IMAGE_TOKENS,
    ImageError,
    ImageProcessor,
    Tiles,
    open_image,
)
from l4jax.text.image_io import ImageSource
from l4jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool", "ipython")


class PromptError(ValueError):
    """Messages, a template or a prompt that cannot be encoded; names the field and the cause."""


@dataclass(frozen=True)
class Prompt:
    """The model's input. The `<|patch|>` ids take the features of the tiles, image by image."""

    token_ids: tuple[int, ...]
    images: tuple[Tiles, ...]


def render_chat(
    tokenizer: Tokenizer,
    processor: ImageProcessor | None,
    messages: Sequence[dict[str, Any]],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
    max_images: int = 10,
) -> Prompt:
    """Render OpenAI-style messages with the chat template.

    A message is `{"role": ..., "content": ...}`; content is text or a list of parts:
    `{"type": "text", "text": ...}`, `{"type": "image_url", "image_url": {"url": "data:..."}}`, or
    `{"type": "image", "image": ...}` with a `pathlib.Path`, bytes, a Pillow image or a data: URI.
    A `str` never names a file: messages may come from the network, and JSON has no Path.

    Args:
        tokenizer, processor: the checkpoint's; no processor for a model without vision.
        messages: oldest first.
        chat_template: a Jinja template that replaces the checkpoint's.
        add_generation_prompt: append the header that opens the assistant's turn.
        tools: OpenAI-style function definitions, passed to the template.
        max_images: limit over all messages; more images are refused.

    Raises:
        PromptError: names the field at fault, such as `messages[1].content[0].type`.
    """
    template = chat_template or tokenizer.chat_template
    if template is None:
        raise PromptError(
            "The checkpoint has no chat template: add chat_template.jinja to its folder, pass "
            "chat_template, or use a raw prompt."
        )
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("messages must be a list with at least one message.")
    escaper = SpecialTokenEscaper(tokenizer)
    sources: list[tuple[str, ImageSource]] = []
    plain = [
        read_message(message, f"messages[{n}]", escaper, sources)
        for n, message in enumerate(messages)
    ]
    if len(sources) > max_images:
        raise PromptError(
            f"messages hold {len(sources)} images, more than max_images = {max_images}; send fewer."
        )
    if tools is not None and not all(isinstance(tool, dict) for tool in tools):
        raise PromptError("tools must be a list of objects, each the definition of a function.")
    definitions = escaper.escape(tools, "tools") if tools else None
    try:
        text = tokenizer.render(
            plain,
            template=template,
            add_generation_prompt=add_generation_prompt,
            tools=definitions,
        )
    except Exception as error:  # templates are programs from the checkpoint and raise anything
        raise PromptError(f"The chat template failed on these messages: {error}") from error
    images = tuple(make_tiles(processor, where, source) for where, source in sources)
    placeholders = text.count(IMAGE_PLACEHOLDER)
    if placeholders != len(images):
        raise PromptError(
            f"The chat template wrote {placeholders} {IMAGE_PLACEHOLDER} for {len(images)} images; "
            "it does not show images where these messages have them, so move them or pass a "
            "chat_template."
        )
    return Prompt(encode_rendered(tokenizer, processor, text, images, escaper), images)


def encode_prompt(
    tokenizer: Tokenizer,
    processor: ImageProcessor | None,
    text: str,
    images: Sequence[ImageSource] = (),
) -> Prompt:
    """Encode a raw prompt that holds one `<|image|>` for each image.

    Special tokens in the text count. BOS is prepended unless the text begins with it.

    Raises:
        PromptError: the placeholders do not match the images, or an image cannot be read.
    """
    for token in IMAGE_TOKENS:
        if token != IMAGE_PLACEHOLDER and token in text:
            raise PromptError(
                f"prompt: {token} cannot be written by hand; write one {IMAGE_PLACEHOLDER} for "
                "each image."
            )
    placeholders = text.count(IMAGE_PLACEHOLDER)
    if placeholders != len(images):
        raise PromptError(
            f"prompt: {placeholders} {IMAGE_PLACEHOLDER} in the text for {len(images)} images; "
            "write one for each image, where it belongs."
        )
    tiles = tuple(make_tiles(processor, f"images[{n}]", source) for n, source in enumerate(images))
    ids = encode_rendered(tokenizer, processor, text, tiles)
    bos = tokenizer.bos_id
    return Prompt(ids if ids[:1] == (bos,) else (bos, *ids), tiles)


def encode_rendered(
    tokenizer: Tokenizer,
    processor: ImageProcessor | None,
    text: str,
    images: Sequence[Tiles],
    escaper: "SpecialTokenEscaper | None" = None,
) -> tuple[int, ...]:
    """Encode rendered text, with each `<|image|>` replaced by its image's tokens; add no BOS."""
    image_tokens = iter([processor.format_tokens(tiles) for tiles in images] if processor else [])
    ids: list[int] = []
    for index, piece in enumerate(tokenizer.special_re.split(text)):
        if piece == IMAGE_PLACEHOLDER:
            ids.extend(tokenizer.encode(next(image_tokens), add_special_tokens=False))
        elif index % 2:
            ids.append(tokenizer.special_ids[piece])
        else:
            # The text between two special tokens is encoded in one call. A message is therefore
            # tokenized as if it had never been escaped.
            plain = escaper.unescape(piece) if escaper else piece
            ids.extend(tokenizer.encode(plain, add_special_tokens=False, parse_special=False))
    return tuple(ids)


class SpecialTokenEscaper:
    """Special-token escaping: hides special tokens in messages from template and tokenizer.

    `escape` replaces each by an unguessable word, which survives the template's trims and JSON
    filters. `unescape` restores the characters after the real special tokens have been found.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special_re = tokenizer.special_re
        self._tokens = list(tokenizer.special_ids)
        self._index_of = {name: index for index, name in enumerate(self._tokens)}
        self._word = f"escaped{secrets.token_hex(12)}n"
        self._escaped_re = re.compile(f"{self._word}([0-9]+)n")

    def escape(self, value: Any, where: str) -> Any:
        """Escape every string inside a value of JSON types, field names included."""
        if isinstance(value, str):
            return self._special_re.sub(lambda match: self._escape_token(match[0], where), value)
        if isinstance(value, dict):
            return {
                self.escape(key, where): self.escape(item, f"{where}.{key}")
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.escape(item, f"{where}[{n}]") for n, item in enumerate(value)]
        return value

    def _escape_token(self, token: str, where: str) -> str:
        if token in IMAGE_TOKENS:
            raise PromptError(
                f"{where}: the text holds {token}, which stands for an image; send images as "
                "parts of type image_url, and write the token differently if you only mention it."
            )
        return f"{self._word}{self._index_of[token]}n"

    def unescape(self, text: str) -> str:
        """Restore the characters of escaped tokens."""
        return self._escaped_re.sub(lambda match: self._tokens[int(match[1])], text)


def read_message(
    message: Any, where: str, escaper: SpecialTokenEscaper, sources: list[tuple[str, ImageSource]]
) -> dict[str, Any]:
    """Check one message, escape its text, and append its images to `sources`.

    The result suits Llama's templates. Content of text parts only becomes one string. `null` fields
    and empty tool calls are left out: the published template drops a message that has them. The
    arguments of a tool call become an object; OpenAI sends them as JSON in a string.
    """
    if not isinstance(message, dict):
        raise PromptError(f"{where}: must be an object, not a {type(message).__name__}.")
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}.")
    kept = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls") and value is not None
    }
    calls = message.get("tool_calls")
    content = message.get("content")
    if calls:
        kept["tool_calls"] = read_tool_calls(calls, f"{where}.tool_calls")
        content = "" if content is None else content
    return {
        "role": role,
        "content": read_content(content, f"{where}.content", escaper, sources),
        **escaper.escape(kept, where),
    }


def read_content(
    content: Any, where: str, escaper: SpecialTokenEscaper, sources: list[tuple[str, ImageSource]]
) -> str | list[dict[str, str]]:
    """Check a message's content and escape its text; append its images to `sources`."""
    if isinstance(content, str):
        return escaper.escape(content, where)
    if not isinstance(content, list | tuple) or not content:
        raise PromptError(f"{where}: must be text, or a list with at least one part.")
    parts: list[tuple[str, str | None]] = []  # field name; text, or None for an image
    for n, part in enumerate(content):
        here = f"{where}[{n}]"
        if not isinstance(part, dict):
            raise PromptError(f"{here}: must be an object, not a {type(part).__name__}.")
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise PromptError(f"{here}.text: must be text, not a {type(text).__name__}.")
            # Adjacent texts are joined before escaping, or "<|eo" and "t|>" would slip through.
            before = parts[-1][1] if parts else None
            if before is None:
                parts.append((f"{here}.text", text))
            else:
                parts[-1] = (parts[-1][0], before + text)
        elif kind in ("image", "image_url"):
            sources.append(read_source(part, kind, here))
            parts.append((here, None))
        else:
            raise PromptError(f"{here}.type: {kind!r} is not one of text, image_url, image.")
    escaped = [
        (where, None if text is None else escaper.escape(text, where)) for where, text in parts
    ]
    if len(escaped) == 1 and escaped[0][1] is not None:
        return escaped[0][1]
    return [
        {"type": "image"} if text is None else {"type": "text", "text": text} for _, text in escaped
    ]


def read_source(part: dict[str, Any], kind: str, where: str) -> tuple[str, ImageSource]:
    """Return the field name and the source of an image part."""
    value, where = part.get(kind), f"{where}.{kind}"
    if kind == "image_url" and isinstance(value, dict):
        value, where = value.get("url"), f"{where}.url"
    if isinstance(value, str):
        if value[:8].lower().startswith(("data:", "http://", "https://")):
            return where, value  # open_image refuses http with a message
        raise PromptError(
            f"{where}: {value[:80]!r} is not a data: URI; to read a local file, pass "
            '{"type": "image", "image": pathlib.Path(...)} from Python.'
        )
    allowed = Image.Image | Path | bytes | bytearray if kind == "image" else Image.Image
    if isinstance(value, allowed):
        return where, value
    wanted = (
        "a data: URI" if kind == "image_url" else "a Path, bytes, a Pillow image or a data: URI"
    )
    raise PromptError(f"{where}: must be {wanted}, not a {type(value).__name__}.")


def read_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Check a message's tool calls and parse their arguments."""
    if not isinstance(calls, list | tuple):
        raise PromptError(f"{where}: must be a list, not a {type(calls).__name__}.")
    result = []
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PromptError(f"{where}[{n}].function: must be an object with a name.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise PromptError(
                    f"{where}[{n}].function.arguments: not valid JSON: {error}."
                ) from error
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result


def make_tiles(processor: ImageProcessor | None, where: str, source: ImageSource) -> Tiles:
    """Open one image and split it into tiles; errors name the field `where`."""
    if processor is None:
        raise PromptError(f"{where}: this model takes no images; send text only.")
    try:
        return processor(open_image(source))
    except ImageError as error:
        raise PromptError(f"{where}: {error}") from error
