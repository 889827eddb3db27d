"""Guesses at what comes next, found in what was already said: prompt lookup. No jax."""

import dataclasses
import weakref

import numpy as np

from l4jax.engine.request import Request


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """How to guess; names as in vLLM's `--speculative-config`.

    Attributes:
        num_speculative_tokens: tokens that are guessed at a time, at most.
        prompt_lookup_max: the longest ending of the text that is looked for in it.
        prompt_lookup_min: the shortest.
        method: "ngram", the only one.
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
    """Finds where a text has ended like this before, and guesses that it goes on alike."""

    def __init__(self, speculation: SpeculativeConfig):
        self.speculation = speculation
        self._texts: weakref.WeakKeyDictionary[Request, np.ndarray] = weakref.WeakKeyDictionary()
        self._lengths: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()

    def __call__(self, request: Request, count: int) -> list[int]:
        """At most `count` tokens that may follow those of a request; none if nothing is alike."""
        text, length = self._read(request), len(request.tokens)
        count = min(count, self.speculation.num_speculative_tokens)
        for n in range(
            self.speculation.prompt_lookup_max, self.speculation.prompt_lookup_min - 1, -1
        ):
            if n >= length:
                continue
            # Where n tokens like the last n end, themselves left out.
            ends = np.flatnonzero(text[n - 1 : length - 1] == text[length - 1]) + n
            for back in range(2, n + 1):
                ends = ends[text[ends - back] == text[length - back]]
            if len(ends):
                # The latest that goes on for long enough; else the one that goes on longest.
                enough = ends[ends + count <= length]
                end = int(enough[-1] if len(enough) else ends[0])
                return text[end : min(end + count, length)].tolist()
        return []

    def _read(self, request: Request) -> np.ndarray:
        """A request's tokens as an array, of which only the new ones are copied each time."""
        if request not in self._texts:
            self._texts[request] = np.empty(request.max_length, np.int32)
            self._lengths[request] = 0
        text, known = self._texts[request], self._lengths[request]
        text[known : len(request.tokens)] = request.tokens[known:]
        self._lengths[request] = len(request.tokens)
        return text
