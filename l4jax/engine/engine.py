"""The engine: a loop of schedule, dispatch and postprocess.

It stays one step ahead: the next step is dispatched before the sampled tokens of the last one are
read, so that the devices do not wait for the host.
"""

import dataclasses
import itertools
import logging
import math
import random
import time

import numpy as np

from l4jax.engine.config import EngineConfig
from l4jax.engine.ngram_proposer import NgramProposer
from l4jax.engine.output_batch import SampledTokens
from l4jax.engine.request import (
    Constraints,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from l4jax.engine.runner import PendingStep, Runner
from l4jax.engine.scheduler import Scheduler, SchedulerOutput
from l4jax.text.chat import PromptError
from l4jax.text.image import Tiles

log = logging.getLogger(__name__)

GRAMMAR_ERROR = "the output does not match its grammar, or the grammar exceeds its limits"


@dataclasses.dataclass(frozen=True)
class RequestUpdate:
    """The new tokens of one request after a step.

    Attributes:
        finish_reason: "stop" or "length"; "abort" after its timeout, "error" if its step failed;
            None while the request goes on.
        prompt_logprobs: of each prompt token, None for the first one; in the first update, if
            requested.
        cached_tokens: prompt tokens found in the prefix cache.
        error: the cause, in one line, if the finish_reason is "error".
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """The engine's current state, and its counters since it was made."""

    running: int
    waiting: int
    pages: int  # of all data shards
    pages_used: int  # owned by requests; other pages of the prefix cache are free
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # prompt tokens found in it
    drafted: int  # draft tokens
    accepted: int  # accepted draft tokens
    preemptions: int


class Engine:
    """Continuous batching of requests on a runner that has its weights.

    Not thread-safe: one thread calls it.
    """

    def __init__(self, runner: Runner, engine_config: EngineConfig):
        """Allocate the KV cache. Raises `CapacityError` if the sizes do not fit in memory."""
        self.runner, self.engine_config = runner, engine_config
        self.limits = runner.allocate_kv_cache(engine_config)
        speculation = engine_config.speculation
        self.scheduler = Scheduler(
            self.limits,
            enable_prefix_caching=engine_config.enable_prefix_caching,
            proposer=NgramProposer(speculation) if speculation else None,
        )
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count()
        self._seeds = random.Random(engine_config.seed % 2**64)
        self._pending: PendingStep | None = None  # dispatched, and not yet postprocessed
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._counts = dict.fromkeys(("prompt", "generation", "queries", "hits"), 0)
        self._drafts = {"drafted": 0, "accepted": 0}

    @property
    def has_work(self) -> bool:
        """True if a request is waiting or running."""
        return bool(self._requests)

    def add(
        self,
        token_ids: list[int] | tuple[int, ...],
        params: SamplingParams,
        images: tuple[Tiles, ...] = (),
        *,
        constraints: Constraints | None = None,
        timeout: float | None = None,
    ) -> int:
        """Add a request for one output, and return its id.

        Args:
            token_ids: of the prompt.
            params: sampling parameters; n is ignored.
            images: of the prompt, in order.
            constraints: on the output.
            timeout: seconds after which it ends with its tokens so far, as "abort".

        Raises:
            PromptError: if the prompt cannot run.
        """
        self.check(token_ids, images, params)
        config = self.runner.config
        left = self.limits.max_length - len(token_ids)
        # A grammar ends with an end-of-sequence id, even if `ignore_eos` is set.
        is_endless = params.ignore_eos and (constraints is None or constraints.matcher is None)
        eos_ids = () if is_endless else config.eos_ids
        positions = None
        if images:
            positions = np.flatnonzero(np.array(token_ids) == config.patch_id)
        request = Request(
            id=next(self._ids),
            tokens=list(token_ids),
            prompt_length=len(token_ids),
            max_length=len(token_ids) + min(left, params.max_tokens or left),
            params=params,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            stop_ids=tuple(dict.fromkeys([*eos_ids, *(params.stop_token_ids or ())])),
            images=images,
            patch_positions=positions,
            constraints=constraints or Constraints(),
            deadline=math.inf if timeout is None else time.monotonic() + timeout,
        )
        self._requests[request.id] = request
        if params.prompt_logprobs is not None:
            self._prompt_logprobs[request.id] = [None]
        self.scheduler.add(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request at any time, and release what it owns. Unknown ids are ignored."""
        request = self._requests.pop(request_id, None)
        self._prompt_logprobs.pop(request_id, None)
        if request is not None:
            request.finish_reason = request.finish_reason or "abort"
            self.scheduler.finish(request)

    def step(self) -> list[RequestUpdate]:
        """Start the next step, and return the updates of the one before it.

        A failing step ends its requests. Waiting requests, and requests that were computed before,
        are computed again.
        """
        updates = self._expire()
        if self.scheduler.needs_sampled_tokens:
            previous, self._pending = self._pending, None
            updates += self._postprocess(previous)
        output = self.scheduler.schedule()
        previous, self._pending, failure = self._pending, None, None
        if output is not None:
            try:
                self._pending = self.runner.dispatch(output)
            except Exception as error:  # of any kind: the other requests go on
                failure = error
        updates += self._postprocess(previous)
        if output is not None and failure is not None:
            updates += self._fail(output, failure)
        return updates

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile the programs of the first buckets; the others compile while requests run."""
        self.runner.warm_up(progress=progress)

    @property
    def is_compiling(self) -> bool:
        """True if programs are still compiling in the background, after the warm-up."""
        return self.runner.is_compiling

    def stats(self) -> Stats:
        """Return the current state and the counters."""
        pages, counts = self.scheduler.pages, self._counts
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages=sum(shard.size for shard in pages),
            pages_used=sum(shard.size - shard.free for shard in pages),
            prompt_tokens=counts["prompt"],
            generation_tokens=counts["generation"],
            prefix_queries=counts["queries"],
            prefix_hits=counts["hits"],
            drafted=self._drafts["drafted"],
            accepted=self._drafts["accepted"],
            preemptions=self.scheduler.preemptions,
        )

    def check(
        self,
        token_ids: list[int] | tuple[int, ...],
        images: tuple[Tiles, ...] = (),
        params: SamplingParams | None = None,
    ) -> None:
        """Raise `PromptError` if a prompt cannot run."""
        config, max_length = self.runner.config, self.limits.max_length
        if not token_ids:
            raise PromptError("the prompt is empty: give at least one token.")
        if len(token_ids) >= max_length:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, and with the answer {max_length} fit: "
                f"shorten it to {max_length - 1}, or raise max_model_len."
            )
        vocab = config.text.vocab
        listed = [
            *((params and params.logit_bias) or ()),
            *((params and params.stop_token_ids) or ()),
        ]
        unknown = [token for token in (*token_ids, *listed) if not 0 <= token < vocab]
        if unknown:
            raise PromptError(f"token id {unknown[0]} is not in the vocabulary of {vocab}.")
        if images and config.vision is None:
            raise PromptError("the prompt holds an image, and this model only reads text.")
        if len(images) > self.engine_config.max_images:
            raise PromptError(
                f"the prompt holds {len(images)} images, and {self.engine_config.max_images} are "
                "allowed."
            )
        wanted = sum(len(image.pixels_ICHW) for image in images) * (
            config.vision.features if config.vision else 0
        )
        found = list(token_ids).count(config.patch_id) if config.patch_id is not None else 0
        if wanted != found:
            raise PromptError(
                f"the prompt has {found} image tokens (id {config.patch_id}) "
                f"for {wanted} image features."
            )

    def _expire(self) -> list[RequestUpdate]:
        """End requests that are past their deadline."""
        now = time.monotonic()
        late = [request for request in self._requests.values() if request.deadline < now]
        return [self._end(request, "abort") for request in late]

    def _postprocess(self, pending: PendingStep | None) -> list[RequestUpdate]:
        """Wait for a dispatched step, and add its sampled tokens to their requests."""
        if pending is None:
            return []
        try:
            sampled = pending.result()
        except Exception as error:  # of any kind: the other requests go on
            return self._fail(pending.scheduler_output, error)
        return [update for each in sampled if (update := self._postprocess_chunk(each))]

    def _postprocess_chunk(self, sampled: SampledTokens) -> RequestUpdate | None:
        """Add sampled tokens to their request; None if it has ended, or has no new token."""
        chunk, request = sampled.chunk, sampled.chunk.request
        request.pending -= chunk.max_sampled
        if request.id not in self._requests:
            return None
        prompt_logprobs = self._prompt_logprobs.get(request.id)
        if prompt_logprobs is not None:  # after a preemption some are reported again
            known = len(prompt_logprobs) - sampled.prompt_start
            prompt_logprobs += sampled.prompt_logprobs[known:]
        if not sampled.token_ids:
            return None
        if chunk.drafts:
            self._drafts["drafted"] += len(chunk.drafts)
            self._drafts["accepted"] += len(sampled.token_ids) - 1
            request.computed -= chunk.max_sampled - len(sampled.token_ids)
        is_first = len(request.tokens) == request.prompt_length
        tokens = _cut_at_stop(sampled.token_ids, request.stop_ids)
        logprobs = sampled.logprobs[: len(tokens)]
        request.append(tokens)
        if is_first:
            self._counts["prompt"] += request.prompt_length
            self._counts["queries"] += request.prompt_length
            self._counts["hits"] += request.cached_tokens or 0
        self._counts["generation"] += len(tokens)
        if request.finish_reason is None and not _advance_matcher(request, tokens):
            request.finish_reason = "error"
        update = RequestUpdate(
            request.id,
            tokens,
            logprobs,
            request.finish_reason,
            prompt_logprobs if is_first else None,
            request.cached_tokens or 0,
            GRAMMAR_ERROR if request.finish_reason == "error" else None,
        )
        if request.finish_reason is not None:
            self.cancel(request.id)
        return update

    def _fail(self, output: SchedulerOutput, error: Exception) -> list[RequestUpdate]:
        """End the requests of a failed step; all others are computed again, on an empty pool."""
        log.error("a step failed; its requests end with an error", exc_info=error)
        self._pending = None
        failed = {chunk.request.id for shard in output.chunks for chunk in shard}
        updates = [
            self._end(request, "error", describe_error(error))
            for request in list(self._requests.values())
            if request.id in failed
        ]
        for request in self._requests.values():
            request.pending = 0
        for request in list(self.scheduler.running):
            self.scheduler.preempt(request)
        self.scheduler.reset_prefix_cache()
        self.runner.reset_state()
        return updates

    def _end(self, request: Request, finish_reason: str, error: str | None = None) -> RequestUpdate:
        """End a request with its tokens so far."""
        request.finish_reason = finish_reason
        self.cancel(request.id)
        cached_tokens = request.cached_tokens or 0
        return RequestUpdate(
            request.id, [], [], finish_reason, cached_tokens=cached_tokens, error=error
        )


def describe_error(error: BaseException) -> str:
    """Describe an exception in one line of at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _advance_matcher(request: Request, tokens: list[int]) -> bool:
    """Advance a request's grammar, if it has one, by sampled tokens; False if it fails."""
    matcher = request.constraints.matcher
    if matcher is None:
        return True
    try:
        is_allowed = all([matcher.accept(token) for token in tokens])
        matcher.mask()  # raises if the grammar exceeds its limits; only this request fails then
    except ValueError as error:
        log.error("request %d: %s", request.id, error)
        return False
    return is_allowed


def _cut_at_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Cut tokens after the first stop id; the device checks the first few stop ids only."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens
