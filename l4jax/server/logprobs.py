"""Tokens and their log-probabilities, in OpenAI's two formats and vLLM's one."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from l4jax.engine.request import TokenLogprobs
from l4jax.server.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from l4jax.text.detokenizer import Detokenizer
from l4jax.text.tokenizer import Tokenizer

# JSON has no -inf: OpenAI's value for an impossible token.
LOWEST = -9999.0


class LogprobsFormatter:
    """Formats tokens with their log-probabilities.

    Args:
        tokenizer: the model's.
        as_ids: format tokens as `token_id:17`, which is unique, instead of their text.
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def format_token(self, token: int) -> str:
        """Format a token as its text; `bytes:\\xe2\\x82` for a part of a character."""
        if self._as_ids:
            return f"token_id:{token}"
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def format_chat(self, tokens: Sequence[int], found: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """Format the tokens of a chat completion."""
        content = [
            TokenLogprob(
                **self._format_entry(token, logprobs.chosen),
                top_logprobs=[
                    TopLogprob(**self._format_entry(other, value))
                    for other, value in logprobs.top.items()
                ],
            )
            for token, logprobs in zip(tokens, found, strict=True)
        ]
        return ChatLogprobs(content=content)

    def format_prompt(
        self, tokens: Sequence[int], found: Sequence[TokenLogprobs | None]
    ) -> list[dict[str, Any] | None]:
        """Format a prompt as vLLM does: by token id, the prompt's token and the likeliest ones."""
        return [
            None if logprobs is None else self._format_ranks(token, logprobs)
            for token, logprobs in zip(tokens, found, strict=True)
        ]

    def _format_ranks(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        ranks: dict[int, int | None] = dict(zip(logprobs.top, itertools.count(1), strict=False))
        ranks.setdefault(token, None)  # outside the requested top, its rank is unknown
        return {
            str(other): {
                "logprob": _bound(logprobs.top.get(other, logprobs.chosen)),
                "rank": rank,
                "decoded_token": self.format_token(other),
            }
            for other, rank in ranks.items()
        }

    def _format_entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(self._tokenizer.token_bytes(token))
        return {"token": self.format_token(token), "logprob": _bound(logprob), "bytes": data}


class CompletionLogprobsBuilder:
    """Log-probabilities of a growing text in the format of `/v1/completions`, with text offsets.

    Args:
        formatter: of tokens.
        tokenizer: the model's.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, formatter: LogprobsFormatter, tokenizer: Tokenizer, skip_special_tokens: bool
    ):
        self._formatter = formatter
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def add(
        self, tokens: Iterable[int], found: Iterable[TokenLogprobs | None]
    ) -> CompletionLogprobs:
        """Append tokens, and return their log-probabilities."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, logprobs in zip(tokens, found, strict=True):
            result.tokens.append(self._formatter.format_token(token))
            result.text_offset.append(self._offset)
            self._offset += len(self._detokenizer.push([token]))
            result.token_logprobs.append(None if logprobs is None else _bound(logprobs.chosen))
            result.top_logprobs.append(
                None if logprobs is None else self._format_top(token, logprobs)
            )
        return result

    def _format_top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """Map texts to log-probabilities, including the chosen token's; a shared text keeps the
        likelier token's.
        """
        by_text: dict[str, float] = {}
        for other, value in [*logprobs.top.items(), (token, logprobs.chosen)]:
            by_text.setdefault(self._formatter.format_token(other), _bound(value))
        return by_text


def join_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Concatenate log-probabilities of consecutive parts of a text."""
    return CompletionLogprobs(
        tokens=[x for part in parts for x in part.tokens],
        token_logprobs=[x for part in parts for x in part.token_logprobs],
        top_logprobs=[x for part in parts for x in part.top_logprobs],
        text_offset=[x for part in parts for x in part.text_offset],
    )


def _bound(logprob: float) -> float:
    return max(float(logprob), LOWEST)
