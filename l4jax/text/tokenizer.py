"""Text to token ids and back.

The ids come from the `tokenizers` library, straight from tokenizer.json. On the real tokenizer
that loads in 0.6 s, where `transformers.AutoTokenizer` takes 3.2 s (it imports torch if torch is
installed, and rebuilds the 200,000-entry vocabulary); the ids are the same, and a test compares
them. transformers still renders the chat templates, and is imported when the first one is needed.
"""

import json
import os
import re
import threading
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

_MAKING = threading.Lock()  # of a renderer: what its import sets for a moment is the process's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class TokenizerError(ValueError):
    """A folder without a usable tokenizer, a token that it lacks, or text it cannot encode."""


class Tokenizer:
    """A byte-level BPE tokenizer in Hugging Face layout, such as Llama 4's.

    Safe to share between threads: nothing changes after construction.
    """

    def __init__(self, backend: Any, *, config: dict[str, Any], chat_template: str | None) -> None:
        """Wrap a `tokenizers.Tokenizer`, which the new object then owns; see `from_folder`."""
        from tokenizers import decoders

        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise TokenizerError(
                f"The tokenizer decodes by {type(backend.decoder).__name__}, but Llama 4's is "
                "byte-level; take tokenizer.json from a Llama 4 repository."
            )
        backend.no_truncation()
        backend.no_padding()
        # Special tokens are found here, by special_re, and never by the library. Whether a text
        # may hold them is then an argument, where the library has a switch that threads share.
        backend.encode_special_tokens = True
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens_map = read_special_tokens(config)
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids = {t.content: i for i, t in added.items() if t.special}
        for token in added.values():
            if token.special and (token.lstrip or token.rstrip or token.single_word):
                raise TokenizerError(
                    f"The special token {token.content!r} swallows or needs neighbors (lstrip, "
                    "rstrip, single_word), which is not implemented; Llama 4's do not."
                )
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.special_re = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._silent_ids = frozenset(self.special_ids.values())
        # What the post-processor puts around every text: [BOS] and nothing for Llama 4.
        bare = backend.encode("a", add_special_tokens=False).ids
        full = backend.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self._prefix, self._suffix = full[:start], full[start + len(bare) :]

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Load a checkpoint's tokenizer.

        The chat template is `chat_template.jinja`, or else `chat_template` in
        `tokenizer_config.json`, or else None.

        Raises:
            TokenizerError: no tokenizer there, or one that is not byte-level BPE.
        """
        import tokenizers

        path = Path(folder)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"No tokenizer in {str(folder)!r}: looked for {' and '.join(TOKENIZER_FILES)}; "
                "copy them from the model's Hugging Face repository."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{file} is not a tokenizer: {error}.") from error
        config = read_json(path / "special_tokens_map.json")
        config |= read_json(path / "tokenizer_config.json")
        return cls(backend, config=config, chat_template=read_chat_template(path, config))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that has a token (a model may have more embeddings)."""
        # The ranks of a BPE vocabulary have no holes, so counting them is enough.
        ranks = self.backend.get_vocab_size(with_added_tokens=False)
        return max(ranks, 1 + max(self._added_ids, default=-1))

    @property
    def bos_id(self) -> int:
        """The id of `bos_token`."""
        return self.token_id(self.special_tokens_map.get("bos_token", "<|begin_of_text|>"))

    def token_id(self, text: str) -> int:
        """The id of one token, by its exact text."""
        found = self.backend.token_to_id(text)
        if found is None:
            raise TokenizerError(
                f"The tokenizer has no token {text!r}; it is not a Llama 4 tokenizer, or the "
                "name is misspelt."
            )
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id without a token.

        A token may be part of a UTF-8 character.
        """
        # The library counts ids in 32 bits, and raises beyond.
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        table = byte_of_char()
        if all(char in table for char in token):
            return bytes(table[char] for char in token)
        return token.encode()

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this id out by default."""
        return token_id in self._silent_ids

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            add_special_tokens: put BOS in front, as the checkpoint's tokenizer.json says.
            parse_special: read `<|eot|>` and the like in the text as tokens. If False they are
                encoded as the characters they are written with.
        """
        ids: list[int] = []
        # split with a capture group: texts at even places, special tokens at odd ones.
        pieces = self.special_re.split(text) if parse_special else [text]
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self.special_ids[piece])
            elif piece:
                ids.extend(self._encode_plain(piece))
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode_plain(self, text: str) -> list[int]:
        try:
            # The fast variant skips the character offsets, which nobody here asks for.
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:
            raise TokenizerError(
                "The text holds half of a surrogate pair (U+D800 to U+DFFF), which is no "
                "character; remove it or send the whole pair."
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some ids. Ids without a token decode to nothing, invalid UTF-8 to U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < 1 << 32]
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[dict[str, Any]], *, template: str, **values: Any) -> str:
        """Render a chat template as transformers does, with its filters and date functions."""
        with _MAKING:
            renderer = self._renderer
        return renderer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **values
        )

    @cached_property
    def _renderer(self) -> Any:
        import tokenizers

        # Imported without PyTorch, transformers says so on the terminal, to someone who uses jax.
        quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
        was_set = quiet in os.environ
        os.environ.setdefault(quiet, "1")
        try:
            from transformers import PreTrainedTokenizerFast
        finally:
            if not was_set:
                del os.environ[quiet]
        # Rendering needs the names of the special tokens and no vocabulary: an empty one saves
        # loading the real one a second time.
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
            **self.special_tokens_map,
        )


@lru_cache
def byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    GPT-2's alphabet: a printable Latin-1 character is its own byte; the other bytes, in order, are
    the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def read_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like; each is text or an object that holds `content`."""
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TokenizerError(f"{path} does not hold a JSON object: {error}.") from error
