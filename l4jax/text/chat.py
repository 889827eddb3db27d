"""Conversations and raw prompts to token ids and tiles.

Text that comes from outside cannot forge structure. In a conversation, `<|eot|>` and every other
special token written in a message, a tool or an argument is encoded as the characters it is
written with, as Meta's own encoder does and as transformers offers (`sanitize_control_tokens`).
Only the chat template ends a turn. The six image tokens are refused instead: whoever writes
`<|image|>` in a message expects a picture there, and would silently get none.
A raw prompt (`spell_prompt`) is the caller's own program, and its special tokens count.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from l4jax.text.image import IMAGE_MARK, IMAGE_TOKENS, ImageError, ImageProcessor, Tiles, open_image
from l4jax.text.picture import ImageSource
from l4jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool", "ipython")


class PromptError(ValueError):
    """Messages, a template or a prompt that cannot become a prompt; says which field, and why."""


@dataclass(frozen=True)
class Prompt:
    """What the model reads. The `<|patch|>` ids take the tiles' features, picture by picture."""

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
        chat_template: a Jinja template in place of the checkpoint's.
        add_generation_prompt: open the assistant's turn at the end.
        tools: OpenAI-style function definitions, handed to the template.
        max_images: more pictures than this, in all messages, are refused.

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
    shield = Shield(tokenizer)
    sources: list[tuple[str, ImageSource]] = []
    plain = [
        read_message(message, f"messages[{n}]", shield, sources)
        for n, message in enumerate(messages)
    ]
    if len(sources) > max_images:
        raise PromptError(
            f"messages hold {len(sources)} images, more than max_images = {max_images}; send fewer."
        )
    if tools is not None and not all(isinstance(tool, dict) for tool in tools):
        raise PromptError("tools must be a list of objects, each the definition of a function.")
    definitions = shield.cover(tools, "tools") if tools else None
    try:
        text = tokenizer.render(
            plain,
            template=template,
            add_generation_prompt=add_generation_prompt,
            tools=definitions,
        )
    except Exception as error:  # a template is a program from elsewhere: it may raise anything
        raise PromptError(f"The chat template failed on these messages: {error}") from error
    images = tuple(cut_image(processor, where, source) for where, source in sources)
    marks = text.count(IMAGE_MARK)
    if marks != len(images):
        raise PromptError(
            f"The chat template wrote {marks} {IMAGE_MARK} for {len(images)} images; it does not "
            "show images where these messages have them, so move them or pass a chat_template."
        )
    return Prompt(encode_spelled(tokenizer, processor, text, images, shield), images)


def spell_prompt(
    tokenizer: Tokenizer,
    processor: ImageProcessor | None,
    text: str,
    images: Sequence[ImageSource] = (),
) -> Prompt:
    """Encode a raw prompt that holds one `<|image|>` for each picture.

    Special tokens in the text count. BOS is put in front unless the text begins with it.

    Raises:
        PromptError: the marks and the pictures do not match, or a picture cannot be read.
    """
    for token in IMAGE_TOKENS:
        if token != IMAGE_MARK and token in text:
            raise PromptError(
                f"prompt: {token} cannot be written by hand; write one {IMAGE_MARK} for each image."
            )
    marks = text.count(IMAGE_MARK)
    if marks != len(images):
        raise PromptError(
            f"prompt: {marks} {IMAGE_MARK} in the text for {len(images)} images; write one for "
            "each image, where it belongs."
        )
    tiles = tuple(cut_image(processor, f"images[{n}]", source) for n, source in enumerate(images))
    ids = encode_spelled(tokenizer, processor, text, tiles)
    bos = tokenizer.bos_id
    return Prompt(ids if ids[:1] == (bos,) else (bos, *ids), tiles)


def encode_spelled(
    tokenizer: Tokenizer,
    processor: ImageProcessor | None,
    text: str,
    images: Sequence[Tiles],
    shield: "Shield | None" = None,
) -> tuple[int, ...]:
    """Encode text with each `<|image|>` replaced by the tokens of its picture; no BOS is added."""
    spelled = iter([processor.spell(tiles) for tiles in images] if processor else [])
    ids: list[int] = []
    for place, piece in enumerate(tokenizer.special_re.split(text)):
        if piece == IMAGE_MARK:
            ids.extend(tokenizer.encode(next(spelled), add_special_tokens=False))
        elif place % 2:
            ids.append(tokenizer.special_ids[piece])
        else:
            # Between special tokens the text is encoded in one go, so that what a message says
            # is cut into tokens as if it had never been covered.
            plain = shield.uncover(piece) if shield else piece
            ids.extend(tokenizer.encode(plain, add_special_tokens=False, parse_special=False))
    return tuple(ids)


class Shield:
    """Keeps special tokens that messages spell out away from the template and the tokenizer.

    `cover` writes an unguessable word for each; the template carries the word along (through its
    trims and JSON too); `uncover` puts the characters back once the real special tokens are found.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special_re = tokenizer.special_re
        self._names = list(tokenizer.special_ids)
        self._place_of = {name: place for place, name in enumerate(self._names)}
        self._word = f"covered{secrets.token_hex(12)}n"
        self._covered_re = re.compile(f"{self._word}([0-9]+)n")

    def cover(self, value: Any, where: str) -> Any:
        """Cover every text inside a value of JSON types, names of fields included."""
        if isinstance(value, str):
            return self._special_re.sub(lambda match: self._cover_token(match[0], where), value)
        if isinstance(value, dict):
            return {
                self.cover(key, where): self.cover(item, f"{where}.{key}")
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.cover(item, f"{where}[{n}]") for n, item in enumerate(value)]
        return value

    def _cover_token(self, token: str, where: str) -> str:
        if token in IMAGE_TOKENS:
            raise PromptError(
                f"{where}: the text holds {token}, which stands for a picture; send pictures as "
                "parts of type image_url, and write the token differently if you only mention it."
            )
        return f"{self._word}{self._place_of[token]}n"

    def uncover(self, text: str) -> str:
        return self._covered_re.sub(lambda match: self._names[int(match[1])], text)


def read_message(
    message: Any, where: str, shield: Shield, sources: list[tuple[str, ImageSource]]
) -> dict[str, Any]:
    """Check one message, cover its text, and add its pictures to `sources`.

    The result suits Llama's templates: content of text parts only is one text, `null` fields and
    empty tool calls are left out (the published template drops a message that has them), and the
    arguments of a tool call are an object, where OpenAI sends JSON in a string.
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
        "content": read_content(content, f"{where}.content", shield, sources),
        **shield.cover(kept, where),
    }


def read_content(
    content: Any, where: str, shield: Shield, sources: list[tuple[str, ImageSource]]
) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return shield.cover(content, where)
    if not isinstance(content, list | tuple) or not content:
        raise PromptError(f"{where}: must be text, or a list with at least one part.")
    parts: list[tuple[str, str | None]] = []  # where, and the text, or None for a picture
    for n, part in enumerate(content):
        here = f"{where}[{n}]"
        if not isinstance(part, dict):
            raise PromptError(f"{here}: must be an object, not a {type(part).__name__}.")
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise PromptError(f"{here}.text: must be text, not a {type(text).__name__}.")
            # Neighbors are joined before they are covered: "<|eo" and "t|>" would slip through.
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
    covered = [
        (where, None if text is None else shield.cover(text, where)) for where, text in parts
    ]
    if len(covered) == 1 and covered[0][1] is not None:
        return covered[0][1]
    return [
        {"type": "image"} if text is None else {"type": "text", "text": text} for _, text in covered
    ]


def read_source(part: dict[str, Any], kind: str, where: str) -> tuple[str, ImageSource]:
    value, where = part.get(kind), f"{where}.{kind}"
    if kind == "image_url" and isinstance(value, dict):
        value, where = value.get("url"), f"{where}.url"
    if isinstance(value, str):
        if value[:8].lower().startswith(("data:", "http://", "https://")):
            return where, value  # open_image refuses http in words
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


def cut_image(processor: ImageProcessor | None, where: str, source: ImageSource) -> Tiles:
    if processor is None:
        raise PromptError(f"{where}: this model takes no images; send text only.")
    try:
        return processor(open_image(source))
    except ImageError as error:
        raise PromptError(f"{where}: {error}") from error
