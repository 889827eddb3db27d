"""Draft tokens by n-gram lookup in the request's own text (prompt lookup decoding). No jax."""

import dataclasses
import weakref

import numpy as np

from l4jax.engine.request import Request


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """Parameters of speculative decoding; names as in vLLM's `--speculative-config`.

    Attributes:
        num_speculative_tokens: draft tokens of a step, at most.
        prompt_lookup_max: the longest n-gram that is matched.
        prompt_lookup_min: the shortest n-gram.
        method: "ngram", the only method.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    method: str = "ngram"

    def __post_init__(self) -> None:
        if self.method != "ngram":
            raise ValueError(f"speculative_config.method is {self.method!r}: it is 'ngram'.")
        if not 1 <= self.num_speculative_tokens <= 16:
            raise ValueError(
                f"speculative_config.num_speculative_tokens is {self.num_speculative_tokens}: "
                "it must be from 1 to 16."
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ValueError(
                f"speculative_config.prompt_lookup_min is {self.prompt_lookup_min}: it must be "
                f"from 1 to prompt_lookup_max, {self.prompt_lookup_max}."
            )


class NgramProposer:
    """Drafts the tokens that followed an earlier occurrence of the text's last n tokens."""

    def __init__(self, speculation: SpeculativeConfig):
        self.speculation = speculation
        self._texts: weakref.WeakKeyDictionary[Request, np.ndarray] = weakref.WeakKeyDictionary()
        self._lengths: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()

    def __call__(self, request: Request, count: int) -> list[int]:
        """Draft at most `count` tokens that may come next; none without a matching n-gram."""
        text, length = self._read(request), len(request.tokens)
        count = min(count, self.speculation.num_speculative_tokens)
        for n in range(
            self.speculation.prompt_lookup_max, self.speculation.prompt_lookup_min - 1, -1
        ):
            if n >= length:
                continue
            # Ends of earlier occurrences of the last n tokens.
            ends = np.flatnonzero(text[n - 1 : length - 1] == text[length - 1]) + n
            for back in range(2, n + 1):
                ends = ends[text[ends - back] == text[length - back]]
            if len(ends):
                # The latest occurrence with enough tokens after it; else the one with most.
                enough = ends[ends + count <= length]
                end = int(enough[-1] if len(enough) else ends[0])
                return text[end : min(end + count, length)].tolist()
        return []

    def _read(self, request: Request) -> np.ndarray:
        """Return a request's tokens as an array; only new tokens are copied."""
        if request not in self._texts:
            self._texts[request] = np.empty(request.max_length, np.int32)
            self._lengths[request] = 0
        text, known = self._texts[request], self._lengths[request]
        text[known : len(request.tokens)] = request.tokens[known:]
        self._lengths[request] = len(request.tokens)
        return text
