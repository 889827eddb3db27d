"""The tokenizer: encode text as token ids, decode ids, and render chat templates.

The `tokenizers` library computes the ids, straight from tokenizer.json. Llama 4's tokenizer loads
in 0.6 s; `transformers.AutoTokenizer` takes 3.2 s, because it imports torch if torch is installed
and rebuilds the 200,000-entry vocabulary. The ids are the same, and a test compares them.
transformers still renders the chat templates, and is imported for the first one.
"""

import os
import re
import threading
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from l4jax.json_file import quote, read_object_if_present

# Guards the construction of a renderer: it sets an environment variable during an import.
_RENDERER_LOCK = threading.Lock()
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class TokenizerError(ValueError):
    """A folder without a usable tokenizer, a missing token, or text that cannot be encoded."""


class Tokenizer:
    """A byte-level BPE tokenizer in Hugging Face layout, such as Llama 4's.

    Safe to share between threads: nothing changes after construction.
    """

    def __init__(self, backend: Any, *, config: dict[str, Any], chat_template: str | None) -> None:
        """Wrap a `tokenizers.Tokenizer` and take ownership of it; see `from_folder`."""
        from tokenizers import decoders

        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise TokenizerError(
                f"The tokenizer decodes by {type(backend.decoder).__name__}, but Llama 4's is "
                "byte-level; use tokenizer.json of a Llama 4 repository."
            )
        backend.no_truncation()
        backend.no_padding()
        # `special_re` finds special tokens; the library never does. `parse_special` is therefore
        # an argument of `encode`, where the library has a switch that threads share.
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
                    f"The special token {token.content!r} sets lstrip, rstrip or single_word, "
                    "which is not implemented; use Llama 4's tokenizer.json, which sets none."
                )
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.special_re = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._skipped_ids = frozenset(self.special_ids.values())
        # The post-processor's prefix and suffix of every text: [BOS] and none for Llama 4.
        bare = backend.encode("a", add_special_tokens=False).ids
        full = backend.encode("a", add_special_tokens=True).ids
        places = range(len(full) if bare else 0)
        start = next((i for i in places if full[i : i + len(bare)] == bare), None)
        if start is None:
            raise TokenizerError(
                f"The tokenizer encodes 'a' as {bare}, and as {full} with special tokens; "
                "use tokenizer.json of a Llama 4 repository."
            )
        self._prefix, self._suffix = full[:start], full[start + len(bare) :]

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Load a checkpoint's tokenizer.

        The chat template is `chat_template.jinja`, or else `chat_template` in
        `tokenizer_config.json`, or else None.

        Raises:
            TokenizerError: the folder has no tokenizer, or it is not byte-level BPE.
        """
        import tokenizers

        path = Path(folder)
        file = path / "tokenizer.json"
        if not file.exists():
            raise TokenizerError(
                f"No tokenizer in {str(folder)!r}: it needs {' and '.join(TOKENIZER_FILES)}; "
                "copy them from the model's Hugging Face repository."
            )
        if not file.is_file():
            raise TokenizerError(f"{file} is not a regular file: download it again.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except BaseException as error:  # plain Exception, and PanicException of Rust code
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise TokenizerError(f"{file} is not a tokenizer: {error}.") from error
        config = read_object_if_present(path / "special_tokens_map.json", TokenizerError)
        config |= read_object_if_present(path / "tokenizer_config.json", TokenizerError)
        check_added_tokens(backend, config, file)
        return cls(backend, config=config, chat_template=read_chat_template(path, config))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id of a token (a model may have more embeddings)."""
        # The ranks of a BPE vocabulary have no gaps, so their count is enough.
        ranks = self.backend.get_vocab_size(with_added_tokens=False)
        return max(ranks, 1 + max(self._added_ids, default=-1))

    @property
    def bos_id(self) -> int:
        """The id of `bos_token`."""
        return self.token_id(self.special_tokens_map.get("bos_token", "<|begin_of_text|>"))

    @property
    def default_eos_ids(self) -> tuple[int, ...]:
        """The id of `eos_token`, for a model whose files name no end ids; empty if it has none."""
        token = self.special_tokens_map.get("eos_token")
        return () if token is None else (self.token_id(token),)

    def token_id(self, text: str) -> int:
        """Return the id of one token, by its exact text."""
        found = self.backend.token_to_id(text)
        if found is None:
            raise TokenizerError(
                f"The tokenizer has no token {text!r}; it is not a Llama 4 tokenizer, or the "
                "name is misspelt."
            )
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for an id without a token.

        A token may be part of a UTF-8 character.
        """
        # The library raises for ids of more than 32 bits.
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        table = byte_of_char()
        if all(char in table for char in token):
            return bytes(table[char] for char in token)
        return token.encode()

    def is_special(self, token_id: int) -> bool:
        """Return True if `decode` skips this id by default."""
        return token_id in self._skipped_ids

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Encode a text as token ids.

        Args:
            text: any text.
            add_special_tokens: add BOS as the checkpoint's tokenizer.json says.
            parse_special: read `<|eot|>` and the like in the text as tokens. If False they are
                encoded as their characters.
        """
        ids: list[int] = []
        # The capture group puts texts at even indices and special tokens at odd ones.
        pieces = self.special_re.split(text) if parse_special else [text]
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self.special_ids[piece])
            elif piece:
                ids.extend(self._encode_plain(piece))
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode_plain(self, text: str) -> list[int]:
        try:
            # The fast variant skips the character offsets, which are not needed here.
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:
            raise TokenizerError(
                "The text holds half of a surrogate pair (U+D800 to U+DFFF), which is no "
                "character; remove it or send the whole pair."
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids. Ids without a token decode to nothing, invalid UTF-8 to U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < 1 << 32]
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[dict[str, Any]], *, template: str, **values: Any) -> str:
        """Render a chat template as transformers does, with its filters and date functions."""
        with _RENDERER_LOCK:
            renderer = self._renderer
        return renderer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **values
        )

    @cached_property
    def _renderer(self) -> Any:
        import tokenizers

        # Without PyTorch, transformers prints an advice at import that l4jax's users do not need.
        quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
        was_set = quiet in os.environ
        os.environ.setdefault(quiet, "1")
        try:
            from transformers import PreTrainedTokenizerFast
        finally:
            if not was_set:
                del os.environ[quiet]
        # Rendering needs the special tokens' names but no vocabulary. An empty vocabulary avoids
        # loading the real one a second time.
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
            **self.special_tokens_map,
        )


@lru_cache
def byte_of_char() -> dict[str, int]:
    """Map each character of a byte-level token to its byte.

    GPT-2's alphabet: a printable Latin-1 character is its own byte; the other bytes, in order, are
    the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def read_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Read `bos_token` and the like; each is a string or an object with `content`."""
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise TokenizerError(
                f"tokenizer_config.json: {name} is {quote(value)}, not the text of a token."
            )
        if value:
            tokens[name] = value
    return tokens


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Read the chat template from `chat_template.jinja` or the tokenizer's config."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            if not file.is_file():
                raise OSError("it is not a regular file")
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(
                f"{file} is not a chat template: {error}; download it again."
            ) from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {
            entry.get("name"): entry.get("template") for entry in template if type(entry) is dict
        }
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {quote(template)}, "
            "not the text of a Jinja template."
        )
    return template


def check_added_tokens(backend: Any, config: dict[str, Any], file: Path) -> None:
    """Refuse a vocabulary whose ids have gaps or differ from the tokenizer's config.

    The library gives an added token the next free id, whatever tokenizer.json says. So a vocabulary
    that lost tokens would shift the special tokens without an error.
    """
    way_out = "download tokenizer.json and tokenizer_config.json again."
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    tokens = backend.get_vocab_size(with_added_tokens=True)
    highest = max(backend.get_vocab_size(with_added_tokens=False) - 1, *added) if added else None
    if highest is not None and highest >= tokens:
        raise TokenizerError(
            f"{file} has {tokens} tokens with ids up to {highest}: tokens are lost; {way_out}"
        )
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise TokenizerError(
            f"{file.with_name('tokenizer_config.json')}: added_tokens_decoder is {quote(listed)}, "
            f"not an object; {way_out}"
        )
    for token_id, entry in listed.items():
        content = entry.get("content") if isinstance(entry, dict) else entry
        found = backend.token_to_id(content) if isinstance(content, str) else None
        if str(found) != token_id:
            raise TokenizerError(
                f"{file.with_name('tokenizer_config.json')}: added_tokens_decoder gives "
                f"{quote(content)} the id {quote(token_id)}, and tokenizer.json gives it {found}; "
                f"{way_out}"
            )
