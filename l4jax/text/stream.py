"""Token ids to text, as they arrive."""

import codecs
from collections.abc import Iterable

from l4jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns one request's tokens into text, piece by piece.

    It never emits part of a character, it costs the same for every token however long the text
    is, and all pieces together are `tokenizer.decode` of all ids. Byte-level tokens make this
    simple: a token is bytes, and an incremental UTF-8 decoder holds back the few (at most three)
    that do not end a character yet.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # "replace" puts U+FFFD for invalid bytes, as many as the tokenizers library does.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids and return the characters that they complete."""
        tokenizer, skip = self._tokenizer, self._skip_special_tokens
        kept = (int(i) for i in ids if not (skip and tokenizer.is_special(int(i))))
        return self._decoder.decode(b"".join(map(tokenizer.token_bytes, kept)))

    def finish(self) -> str:
        """Return what was held back: U+FFFD for a character that never ended, else nothing."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
