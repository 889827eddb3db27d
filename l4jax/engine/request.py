"""What a caller asks for, and where that stands. No jax."""

import dataclasses
import functools
import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from l4jax.text.image import Tiles

MAX_LOGPROBS = 20  # as OpenAI's API allows
MAX_BIASES = 320  # entries of logit_bias; OpenAI allows 300
MAX_STOP_IDS = 32  # that are known to the device; a request may have more unless it has min_tokens


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must look like: one of these, spelled as in vLLM.

    Attributes:
        json: a JSON schema, as an object or as text.
        regex: a regular expression that the whole answer matches.
        choice: the answers that are allowed.
        grammar: a grammar in Lark's notation.
        json_object: any JSON object.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in dataclasses.fields(self) if self._has(field.name)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs has {', '.join(given) or 'nothing'}: give exactly one of "
                "json, regex, choice, grammar and json_object."
            )

    def _has(self, name: str) -> bool:
        return getattr(self, name) not in (None, False)

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return next(field.name for field in dataclasses.fields(self) if self._has(field.name))

    @property
    def value(self) -> Any:
        """What it says."""
        return getattr(self, self.kind)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample one request; names, defaults and meanings as in vLLM's class of this name.

    Attributes:
        n: answers to the prompt, each drawn on its own.
        temperature: 0 is greedy.
        top_k: keep the likeliest k; 0 or -1 keeps all.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: drop tokens less likely than this fraction of the likeliest.
        presence_penalty: taken off the logit of each token that the answer holds.
        frequency_penalty: the same, for each time that the answer holds it.
        repetition_penalty: logits of tokens that prompt or answer hold are divided by it where
            they are positive, and multiplied where not.
        logit_bias: token id -> what is added to its logit; -100 forbids in practice.
        seed: the same request with the same seed gives the same tokens, whatever else runs; None
            draws one. Answer i of n takes seed + i.
        min_tokens: tokens before which no stop id is drawn.
        max_tokens: tokens to generate at most; None is up to the model's length.
        stop: strings that end the text; they are not part of it unless
            `include_stop_str_in_output`.
        stop_token_ids: ids that end the text, beside the model's own unless `ignore_eos`.
        bad_words: words that the answer may not hold.
        logprobs: how many of the likeliest tokens to report for each position; 0 reports the chosen
            one.
        prompt_logprobs: the same, for the tokens of the prompt.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: what the answer must look like.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        def is_logprobs(value: int | None) -> bool:
            return value is None or 0 <= value <= MAX_LOGPROBS

        biases = list((self.logit_bias or {}).values())
        checks = (
            (self.n >= 1, "n", "at least 1"),
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "temperature",
                "at least 0",
            ),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= -1, "top_k", "at least 1, or 0 or -1 for all"),
            (0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", "from -2 to 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", "from -2 to 2"),
            (
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "repetition_penalty",
                "above 0",
            ),
            (len(biases) <= MAX_BIASES, "logit_bias", f"of at most {MAX_BIASES} tokens"),
            (all(-100 <= bias <= 100 for bias in biases), "logit_bias", "from -100 to 100 each"),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1"),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1"),
            (
                0 <= self.min_tokens <= (self.max_tokens or math.inf),
                "min_tokens",
                "at least 0, and at most max_tokens",
            ),
            (is_logprobs(self.logprobs), "logprobs", f"0 to {MAX_LOGPROBS}"),
            (is_logprobs(self.prompt_logprobs), "prompt_logprobs", f"0 to {MAX_LOGPROBS}"),
        )
        for is_right, name, wanted in checks:
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {wanted}.")
        if "" in self.stops:
            raise ValueError("stop holds an empty string, which would end every text at once.")
        if "" in (self.bad_words or ()):
            raise ValueError("bad_words holds an empty string, which every text holds.")
        if self.min_tokens and len(self.stop_token_ids or ()) > MAX_STOP_IDS - 8:
            raise ValueError(
                f"stop_token_ids holds {len(self.stop_token_ids or ())} ids: with min_tokens it "
                f"may hold {MAX_STOP_IDS - 8}."
            )

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with some of them changed."""
        return dataclasses.replace(self, **changes)

    def split(self) -> list["SamplingParams"]:
        """The settings of each of the n answers, which are drawn as if asked for one by one."""
        seeds = [None if self.seed is None else (self.seed + i) % 2**63 for i in range(self.n)]
        return [dataclasses.replace(self, n=1, seed=seed) for seed in seeds]

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change what comes next."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: the model's own, before temperature and filters."""

    chosen: float
    top: dict[int, float]  # the likeliest tokens asked for, the likeliest first


class Matcher(Protocol):
    """Follows an answer through its grammar."""

    def mask(self) -> np.ndarray:
        """int32 [vocab / 32]: bit i of word w says whether token 32 w + i may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by a token; whether it was allowed."""
        ...


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What an answer must keep to, in token ids."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    matcher: Matcher | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt on its way: what was asked, the tokens so far, and the pages it owns.

    `tokens` is prompt and output in one, as far as the host knows it; `pending` more have been
    drawn on the device, or will be by what has been dispatched. Keys and values of the first
    `computed` tokens are cached, or will be by what has been dispatched.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    max_length: int  # of prompt and output together
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    images: tuple[Tiles, ...] = ()
    patch_positions: np.ndarray | None = None  # of the image tokens of the prompt, in order
    constraints: Constraints = Constraints()
    deadline: float = math.inf  # of the monotonic clock
    computed: int = 0
    pending: int = 0
    finish_reason: str | None = None
    # Where it runs: filled in by the scheduler at admission.
    shard: int = 0
    slot: int = 0  # of what the device remembers of it
    cached: int | None = None  # tokens found in the prefix cache when it was first admitted
    global_pages: list[int] = dataclasses.field(default_factory=list)
    local_pages: list[list[int]] = dataclasses.field(default_factory=list)  # of each local group
    feature_slots: list[int] = dataclasses.field(default_factory=list)  # of each tile
    is_fresh: bool = False  # admitted, and not yet in a plan
    named_blocks: int = 0  # whose pages the prefix cache knows
    _block_hashes: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and output, those that only the device knows included."""
        return len(self.tokens) + self.pending

    @property
    def is_prefilling(self) -> bool:
        """Whether more than its last token has yet to be run, or an image is in that token."""
        return self.length - self.computed > 1 or self.computed < self.patches_end

    @property
    def is_complete(self) -> bool:
        """Whether all its tokens have been drawn, or will be by what has been dispatched."""
        return self.length >= self.max_length

    @property
    def is_host_driven(self) -> bool:
        """Whether the host must know a token before the next can be drawn."""
        matcher, bad_words = self.constraints.matcher, self.constraints.bad_words
        return matcher is not None or any(len(word) > 1 for word in bad_words)

    @property
    def has_logits_processors(self) -> bool:
        """Whether its logits are changed before a token is drawn, or asked about."""
        params = self.params
        return bool(
            params.has_penalties
            or params.logit_bias
            or params.min_tokens
            or params.logprobs is not None
            or params.prompt_logprobs is not None
            or self.constraints.bad_words
            or self.constraints.matcher is not None
        )

    @property
    def output(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @functools.cached_property
    def tile_hashes(self) -> list[bytes]:
        """A digest of the pixels of each image tile of the prompt."""
        return [name for image in self.images for name in image.hashes]

    @property
    def tiles(self) -> int:
        """Image tiles of the prompt."""
        return sum(len(image.pixels_ICHW) for image in self.images)

    @property
    def patches_end(self) -> int:
        """The position behind the last image token; 0 without images."""
        positions = self.patch_positions
        return 0 if positions is None or not len(positions) else int(positions[-1]) + 1

    def hash_block(self, index: int, page: int) -> bytes:
        """The name of the contents of tokens index * page .. of the request, and of all before.

        Two blocks of one name hold the same keys and values: image tokens are named after their
        pixels. The tokens must be known.
        """
        names = self._block_hashes
        while len(names) <= index:
            start = len(names) * page
            digest = hashlib.blake2b(names[-1] if names else b"", digest_size=16)
            digest.update(array("i", self.tokens[start : start + page]).tobytes())
            if self.patch_positions is not None and start < self.patches_end:
                first, last = np.searchsorted(self.patch_positions, (start, start + page))
                if first < last:
                    features = len(self.patch_positions) // self.tiles
                    digest.update(int(first % features).to_bytes(4, "little"))
                    for tile in range(first // features, (last - 1) // features + 1):
                        digest.update(self.tile_hashes[tile])
            names.append(digest.digest())
        return names[index]

    def take(self, tokens: Sequence[int]) -> None:
        """Append chosen tokens; says so where they end the request."""
        self.tokens.extend(tokens)
        if self.tokens[-1] in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
