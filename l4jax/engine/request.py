"""What a caller asks for, and where that stands. No jax."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from l4jax.text.image import Tiles


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample one request; names, defaults and meanings as in vLLM's class of this name.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the likeliest k; 0 or -1 keeps all.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: drop tokens less likely than this fraction of the likeliest.
        seed: the same request with the same seed gives the same tokens, whatever else runs; None
            draws one.
        max_tokens: tokens to generate at most; None is up to the model's length.
        stop: strings that end the text; they are not part of it unless
            `include_stop_str_in_output`.
        stop_token_ids: ids that end the text, beside the model's own unless `ignore_eos`.
        logprobs: how many of the likeliest tokens to report for each position; 0 reports the chosen
            one.
        skip_special_tokens: leave special tokens out of the text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        checks = (
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "temperature",
                "at least 0",
            ),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= -1, "top_k", "at least 1, or 0 or -1 for all"),
            (0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1"),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                f"0 to {MAX_LOGPROBS}",
            ),
        )
        for is_right, name, wanted in checks:
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {wanted}.")
        if "" in self.stops:
            raise ValueError("stop holds an empty string, which would end every text at once.")

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with some of them changed."""
        return dataclasses.replace(self, **changes)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


MAX_LOGPROBS = 20  # as OpenAI's API allows


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: the model's own, before temperature and filters."""

    chosen: float
    top: dict[int, float]  # the likeliest tokens asked for, the likeliest first


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt on its way: what was asked, the tokens so far, and the pages it owns.

    `tokens` is prompt and output in one; the first `computed` of them have their keys and values
    cached.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    max_length: int  # of prompt and output together
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    images: tuple[Tiles, ...] = ()
    computed: int = 0
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    # Where it runs: filled in by the scheduler at admission.
    shard: int = 0
    whole_pages: list[int] = dataclasses.field(default_factory=list)
    chunk_pages: list[list[int]] = dataclasses.field(default_factory=list)  # of each local group
    feature_slots: list[int] = dataclasses.field(default_factory=list)  # of each tile

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of the prompt have yet to be run; the last one gives the first output."""
        return self.computed < self.prompt_length

    @property
    def output(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def tiles(self) -> int:
        """Image tiles of the prompt."""
        return sum(len(image.pixels_ICHW) for image in self.images)

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Append chosen tokens; says so where they end the request."""
        self.tokens.extend(tokens)
        self.logprobs.extend(logprobs)
        if self.tokens[-1] in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
