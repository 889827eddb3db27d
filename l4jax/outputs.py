"""Outputs of `LLM`, and the builder that turns the engine's token ids into text."""

import dataclasses
from collections.abc import Sequence

from l4jax.engine.engine import RequestUpdate
from l4jax.engine.request import SamplingParams, TokenLogprobs
from l4jax.text.detokenizer import Detokenizer
from l4jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CompletionDelta:
    """New text and tokens of one completion. The last delta has a `finish_reason`.

    Attributes:
        text: new characters, each complete.
        token_ids: new tokens; some of their characters may be in a later delta.
        logprobs: of the new tokens, if `SamplingParams.logprobs` requests them.
        finish_reason: "stop" or "length" in the last delta, "error" if its step failed.
        stop_reason: the stop string or the stop token id that ended the completion, as in vLLM.
        error: the cause, in one line, if the finish_reason is "error".
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


class GenerationError(RuntimeError):
    """A step that failed, and with it one request or several.

    Attributes:
        outputs: of all requests of the call, in order; a failed one has the finish_reason "error"
            and the text before the failure. Empty for `LLM.stream`.
    """

    def __init__(self, message: str, outputs: "Sequence[RequestOutput]" = ()):
        super().__init__(message)
        self.outputs = list(outputs)


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt; the fields are vLLM's, and the error of a failed one."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its completions; the fields are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True


class CompletionBuilder:
    """One growing completion: detokenizes the updates of a request, and ends it at a stop string.

    Args:
        tokenizer: the model's.
        params: the request's.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.params = params
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._pending = ""  # possible beginning of a stop string
        self._early = 0  # leading characters of the pending ones in which no stop string may end
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self.request_id: int | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.cached_tokens = 0

    def add(self, update: RequestUpdate) -> CompletionDelta:
        """Append an update, and return the text and tokens that it adds."""
        self.request_id = update.request_id
        self.prompt_logprobs = self.prompt_logprobs or update.prompt_logprobs
        self.cached_tokens = update.cached_tokens
        text, count = self._pending, 0
        stop = None
        for count, token in enumerate(update.token_ids, 1):
            # Token by token: tokens after a stop string are not counted.
            text += self._detokenizer.push([token])
            stop = self._find_stop(text, len(self._token_ids) + count)
            if stop is not None:
                break
        tokens, logprobs = update.token_ids[:count], update.logprobs[:count]
        finish_reason = update.finish_reason
        if stop is None and finish_reason is not None:
            text += self._detokenizer.finish()
            stop = self._find_stop(text, len(self._token_ids) + count)
        if stop is not None:
            word, at = stop
            text = text[: at + len(word)] if self.params.include_stop_str_in_output else text[:at]
            finish_reason, self.stop_reason, self._pending = "stop", word, ""
        elif finish_reason is not None:
            self._pending = ""
            if finish_reason == "stop" and tokens[-1] in (self.params.stop_token_ids or ()):
                self.stop_reason = tokens[-1]
        else:
            end = len(text) - self._count_pending(text)
            text, self._pending = text[:end], text[end:]
            self._early = max(self._early - end, 0)
        self._text.append(text)
        self._token_ids += tokens
        self._logprobs += logprobs
        self.finish_reason = finish_reason
        self.error = update.error if finish_reason == "error" else None
        return CompletionDelta(text, tokens, logprobs, finish_reason, self.stop_reason, self.error)

    def build(self, index: int = 0) -> CompletionOutput:
        """Return the completion so far, as number `index` of its prompt."""
        has_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self._text),
            token_ids=self._token_ids,
            cumulative_logprob=sum(x.chosen for x in self._logprobs) if has_logprobs else None,
            logprobs=self._logprobs if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def _find_stop(self, text: str, tokens: int) -> tuple[str, int] | None:
        """Find the first stop string in the text after this many tokens, and its place.

        As in vLLM, a stop string that ends within the first `min_tokens` tokens does not count.
        """
        if tokens <= self.params.min_tokens:
            self._early = len(text)
            return None
        found = [
            (at, stop)
            for stop in self.params.stops
            if (at := text.find(stop, max(self._early - len(stop) + 1, 0))) >= 0
        ]
        return (min(found)[1], min(found)[0]) if found else None

    def _count_pending(self, text: str) -> int:
        """Count the last characters that may begin a stop string."""
        lengths = (
            n for stop in self.params.stops for n in range(1, len(stop)) if text.endswith(stop[:n])
        )
        return max(lengths, default=0)
