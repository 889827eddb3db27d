"""Sampling parameters, and requests with their tokens and pages. No jax."""

import dataclasses
import functools
import hashlib
import math
import numbers
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Protocol

import numpy as np

from l4jax.text.image import Tiles

MAX_LOGPROBS = 20  # the limit of OpenAI's API
MAX_BIASES = 320  # entries of logit_bias; OpenAI allows 300
MAX_STOP_IDS = 32  # on the device; the host checks further ones
MAX_OUTPUTS = 16384  # n of vLLM
GREEDY_TEMPERATURE = 1e-5  # the likeliest token is sampled below it, as in vLLM
_LARGEST = 1e6  # of a factor: products with logits stay finite in float32
_MAX_QUOTED = 100  # characters of a value in an error message


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """The required form of an output: exactly one of the fields, named as in vLLM.

    Attributes:
        json: a JSON schema, as an object or as text.
        regex: a regular expression that the whole output matches.
        choice: the allowed outputs.
        grammar: a grammar in Lark's notation.
        json_object: any JSON object.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [each.name for each in dataclasses.fields(self) if self._has(each.name)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs has {', '.join(given) or 'nothing'}: give exactly one of "
                "json, regex, choice, grammar and json_object."
            )

    def _has(self, name: str) -> bool:
        return getattr(self, name) not in (None, False)

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(each.name for each in dataclasses.fields(self) if self._has(each.name))

    @property
    def value(self) -> Any:
        """The value of the field that is set."""
        return getattr(self, self.kind)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request; names, defaults and meanings are those of vLLM's class.

    Attributes:
        n: outputs for the prompt, sampled independently; at most 16384.
        temperature: 0 is greedy; at most 1e6.
        top_k: keep the likeliest k; 0 or -1 keeps all.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: drop tokens less likely than this fraction of the likeliest.
        presence_penalty: subtracted from the logit of each token that occurs in the output.
        frequency_penalty: subtracted once per occurrence.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that
            occur in prompt or output; from 1e-6 to 1e6.
        logit_bias: token id -> value added to its logit before penalties; -100 forbids in practice.
        seed: the same request with the same seed gives the same tokens in any batch; None and -1
            take a random seed. All 64 bits count. Output i of n takes seed + i.
        min_tokens: output tokens before which no stop id is sampled, and no stop string ends the
            text.
        max_tokens: output tokens, at most; None is up to the model's length.
        stop: strings that end the text; they are cut off unless
            `include_stop_str_in_output`.
        stop_token_ids: ids that end the text, in addition to the model's own unless `ignore_eos`.
        bad_words: words that the output may not contain.
        logprobs: number of likeliest tokens to report for each position; 0 reports the sampled
            token only.
        prompt_logprobs: number of likeliest tokens to report for each prompt token.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the required form of the output.
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
        self._check_types()
        if self.seed == -1:  # vLLM's random seed
            object.__setattr__(self, "seed", None)

        def is_logprobs(value: int | None) -> bool:
            return value is None or 0 <= value <= MAX_LOGPROBS

        biases = list((self.logit_bias or {}).values())
        checks = (
            (1 <= self.n <= MAX_OUTPUTS, "n", f"at least 1 and at most {MAX_OUTPUTS}"),
            (0 <= self.temperature <= _LARGEST, "temperature", "at least 0 and at most 1e6"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= -1, "top_k", "at least 1, or 0 or -1 for all"),
            (0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", "from -2 to 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", "from -2 to 2"),
            (
                1 / _LARGEST <= self.repetition_penalty <= _LARGEST,
                "repetition_penalty",
                "from 1e-6 to 1e6",
            ),
            (len(biases) <= MAX_BIASES, "logit_bias", f"of at most {MAX_BIASES} tokens"),
            (all(-100 <= bias <= 100 for bias in biases), "logit_bias", "from -100 to 100 each"),
            (
                self.seed is None or -(2**63) <= self.seed < 2**63,
                "seed",
                "from -2**63 to 2**63 - 1",
            ),
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
            self._require(is_right, name, wanted)
        if "" in self.stops:
            raise ValueError("stop holds an empty string, which would end every text at once.")
        if "" in (self.bad_words or ()):
            raise ValueError("bad_words holds an empty string, which every text holds.")
        if self.min_tokens and len(self.stop_token_ids or ()) > MAX_STOP_IDS - 8:
            raise ValueError(
                f"stop_token_ids holds {len(self.stop_token_ids or ())} ids: with min_tokens it "
                f"may hold {MAX_STOP_IDS - 8}."
            )

    def _check_types(self) -> None:
        """Refuse values that a step could not store: they come from JSON and from files, too."""

        def hold(values: Any, kind: type) -> bool:
            return all(isinstance(value, kind) for value in values or ())

        def require(name: str, kind: type, wanted: str, *, is_optional: bool = False) -> None:
            value = getattr(self, name)
            is_right = isinstance(value, kind) or (is_optional and value is None)
            self._require(is_right, name, wanted)

        for name in ("n", "top_k", "min_tokens"):
            require(name, numbers.Integral, "an integer")
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            require(name, numbers.Integral, "an integer", is_optional=True)
        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        for name in ("temperature", "top_p", "min_p", *penalties):
            require(name, numbers.Real, "a number")
        require("logit_bias", Mapping, "a number for each token id", is_optional=True)
        require("bad_words", Sequence, "a list of texts", is_optional=True)
        require("stop_token_ids", Sequence, "a list of token ids", is_optional=True)
        require("stop", Sequence, "a text, or a list of texts", is_optional=True)
        self._require(hold(self.stops, str), "stop", "a text, or a list of texts")
        self._require(
            not isinstance(self.bad_words, str) and hold(self.bad_words, str),
            "bad_words",
            "a list of texts",
        )
        are_ids = hold(self.stop_token_ids, numbers.Integral)
        self._require(are_ids, "stop_token_ids", "a list of token ids")
        bias = self.logit_bias or {}
        are_biases = hold(bias, numbers.Integral) and hold(bias.values(), numbers.Real)
        self._require(are_biases, "logit_bias", "a number for each token id")

    def _require(self, is_right: bool, name: str, wanted: str) -> None:
        if not is_right:
            raise ValueError(f"{name} is {_quote(getattr(self, name))}: it must be {wanted}.")

    def replace(self, **changes: Any) -> "SamplingParams":
        """Return a copy with some parameters changed."""
        return dataclasses.replace(self, **changes)

    def split(self) -> list["SamplingParams"]:
        """Return the parameters of each of the n outputs, sampled like separate requests."""
        seeds = [None if self.seed is None else _add_to_seed(self.seed, i) for i in range(self.n)]
        return [dataclasses.replace(self, n=1, seed=seed) for seed in seeds]

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_penalties(self) -> bool:
        """True if logits depend on earlier tokens through a penalty."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1)


def _add_to_seed(seed: int, count: int) -> int:
    """Count up a seed; 0 follows 2**63 - 1, and also -2, because -1 means a random seed."""
    total = seed + count
    if seed < -1 <= total:
        total += 1
    return total if total < 0 else total % 2**63


def _quote(value: object) -> str:
    """Write a value for an error message, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers beyond 4300 digits
        return "a very long integer"
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: the model's own, before temperature and filters."""

    chosen: float
    top: dict[int, float]  # the requested number of likeliest tokens, the likeliest first


class Matcher(Protocol):
    """The state of an output in its grammar."""

    def mask(self) -> np.ndarray:
        """Return int32 [vocab / 32]: bit i of word w is set if token 32 w + i may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Advance by a token; return whether it was allowed."""
        ...


@dataclasses.dataclass(frozen=True)
class Constraints:
    """Constraints on an output, in token ids."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    matcher: Matcher | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """A request: its parameters, its tokens so far, and the pages that it owns.

    `tokens` is prompt and output, as far as the host knows it. `pending` more tokens have been
    sampled on the device, or will be by the dispatched steps. Keys and values of the first
    `computed` tokens are in the KV cache, or will be by the dispatched steps.
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
    # Set by the scheduler at admission.
    shard: int = 0
    slot: int = 0  # of the decode state on the device
    cached_tokens: int | None = None  # prefix cache hit at the first admission
    global_pages: list[int] = field(default_factory=list[int])
    local_pages: list[list[int]] = field(default_factory=list[list[int]])  # of each local group
    feature_slots: list[int] = field(default_factory=list[int])  # of each tile
    is_fresh: bool = False  # admitted, and not yet scheduled
    cached_blocks: int = 0  # leading blocks whose pages are in the prefix cache
    _block_hashes: list[bytes] = field(default_factory=list[bytes])

    @property
    def length(self) -> int:
        """Tokens of prompt and output, pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def owned_pages(self) -> int:
        """Pages of all groups that the request owns."""
        return len(self.global_pages) + sum(map(len, self.local_pages))

    @property
    def is_prefilling(self) -> bool:
        """True if more than its last token is to be computed, or that token is an image token."""
        return self.length - self.computed > 1 or self.computed < self.patches_end

    @property
    def is_complete(self) -> bool:
        """True if all its tokens have been sampled, or will be by the dispatched steps."""
        return self.length >= self.max_length

    @property
    def is_host_driven(self) -> bool:
        """True if the host must know a token before the next one is sampled."""
        matcher, bad_words = self.constraints.matcher, self.constraints.bad_words
        return matcher is not None or any(len(word) > 1 for word in bad_words)

    @property
    def has_logits_processors(self) -> bool:
        """True if its logits are changed before sampling, or reported."""
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
        """A hash of the pixels of each image tile of the prompt."""
        return [tile_hash for image in self.images for tile_hash in image.hashes]

    @property
    def tiles(self) -> int:
        """Image tiles of the prompt."""
        return sum(len(image.pixels_ICHW) for image in self.images)

    @property
    def patches_end(self) -> int:
        """The position after the last image token; 0 without images."""
        positions = self.patch_positions
        return 0 if positions is None or not len(positions) else int(positions[-1]) + 1

    def hash_block(self, index: int, page: int) -> bytes:
        """Hash the tokens of block `index`, of `page` tokens, and all tokens before it.

        Blocks with the same hash have the same keys and values: image tokens are hashed by their
        pixels. The host must know the tokens.
        """
        hashes = self._block_hashes
        while len(hashes) <= index:
            start = len(hashes) * page
            digest = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=16)
            digest.update(array("i", self.tokens[start : start + page]).tobytes())
            if self.patch_positions is not None and start < self.patches_end:
                first, last = np.searchsorted(self.patch_positions, (start, start + page))
                if first < last:
                    features = len(self.patch_positions) // self.tiles
                    digest.update(int(first % features).to_bytes(4, "little"))
                    for tile in range(first // features, (last - 1) // features + 1):
                        digest.update(self.tile_hashes[tile])
            hashes.append(digest.digest())
        return hashes[index]

    def append(self, tokens: Sequence[int]) -> None:
        """Append sampled tokens, and set `finish_reason` if they end the request."""
        self.tokens.extend(tokens)
        if self.tokens[-1] in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
