"""Incremental detokenization."""

import codecs
from collections.abc import Iterable

from l4jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one request's tokens into text, incrementally.

    It never emits part of a character. Every token costs the same, however long the text is. All
    pieces joined equal `tokenizer.decode` of all ids. A byte-level token is bytes: an incremental
    UTF-8 decoder buffers the at most three bytes of an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # "replace" writes as many U+FFFD for invalid bytes as the tokenizers library does.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids and return the characters that they complete."""
        tokenizer, skip = self._tokenizer, self._skip_special_tokens
        kept = (int(i) for i in ids if not (skip and tokenizer.is_special(int(i))))
        return self._decoder.decode(b"".join(map(tokenizer.token_bytes, kept)))

    def finish(self) -> str:
        """Flush the buffer: return U+FFFD for an incomplete character, else an empty string."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
