"""Tokens and their log-probabilities, in OpenAI's two shapes and vLLM's one."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from l4jax.engine.request import TokenLogprobs
from l4jax.server.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from l4jax.text.detokenizer import Detokenizer
from l4jax.text.tokenizer import Tokenizer

# JSON has no -inf: what OpenAI gives for a token that cannot come.
LOWEST = -9999.0


class Speller:
    """Spells tokens as text.

    Args:
        tokenizer: of the model.
        as_ids: spell `token_id:17`, which never stands for two tokens.
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def spell(self, token: int) -> str:
        """A token's text; `bytes:\\xe2\\x82` for one that is part of a character."""
        if self._as_ids:
            return f"token_id:{token}"
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def spell_chat(self, tokens: Sequence[int], found: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """The newer shape."""
        content = [
            TokenLogprob(
                **self._spell_one(token, logprobs.chosen),
                top_logprobs=[
                    TopLogprob(**self._spell_one(other, value))
                    for other, value in logprobs.top.items()
                ],
            )
            for token, logprobs in zip(tokens, found, strict=True)
        ]
        return ChatLogprobs(content=content)

    def spell_prompt(
        self, tokens: Sequence[int], found: Sequence[TokenLogprobs | None]
    ) -> list[dict[str, Any] | None]:
        """vLLM's shape for prompts: by token id, the prompt's own and the likeliest."""
        return [
            None if logprobs is None else self._spell_ranks(token, logprobs)
            for token, logprobs in zip(tokens, found, strict=True)
        ]

    def _spell_ranks(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        ranks: dict[int, int | None] = dict(zip(logprobs.top, itertools.count(1), strict=False))
        ranks.setdefault(token, None)  # beyond those asked for, it has no known rank
        return {
            str(other): {
                "logprob": _bound(logprobs.top.get(other, logprobs.chosen)),
                "rank": rank,
                "decoded_token": self.spell(other),
            }
            for other, rank in ranks.items()
        }

    def _spell_one(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(self._tokenizer.token_bytes(token))
        return {"token": self.spell(token), "logprob": _bound(logprob), "bytes": data}


class Ledger:
    """The older shape, as a text grows: with the place of each token in it.

    Args:
        speller: of tokens.
        tokenizer: of the model.
        skips_special_tokens: whether the text leaves them out.
    """

    def __init__(self, speller: Speller, tokenizer: Tokenizer, skips_special_tokens: bool):
        self._speller = speller
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skips_special_tokens)
        self._offset = 0

    def take(
        self, tokens: Iterable[int], found: Iterable[TokenLogprobs | None]
    ) -> CompletionLogprobs:
        """What the next tokens add."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, logprobs in zip(tokens, found, strict=True):
            result.tokens.append(self._speller.spell(token))
            result.text_offset.append(self._offset)
            self._offset += len(self._detokenizer.push([token]))
            result.token_logprobs.append(None if logprobs is None else _bound(logprobs.chosen))
            result.top_logprobs.append(
                None if logprobs is None else self._spell_top(token, logprobs)
            )
        return result

    def _spell_top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """By text, and where two tokens share one, the likelier; the chosen one is there, too."""
        by_text: dict[str, float] = {}
        for other, value in [*logprobs.top.items(), (token, logprobs.chosen)]:
            by_text.setdefault(self._speller.spell(other), _bound(value))
        return by_text


def join(ledgers: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Several pieces of the older shape as one."""
    return CompletionLogprobs(
        tokens=[x for part in ledgers for x in part.tokens],
        token_logprobs=[x for part in ledgers for x in part.token_logprobs],
        top_logprobs=[x for part in ledgers for x in part.top_logprobs],
        text_offset=[x for part in ledgers for x in part.text_offset],
    )


def _bound(logprob: float) -> float:
    return max(float(logprob), LOWEST)
