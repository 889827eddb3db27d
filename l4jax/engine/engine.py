"""Schedule, run, take note: the engine is a loop of these three.

It keeps one plan ahead: the next is dispatched before the tokens of the last one are read, so that
the devices never wait for the host.
"""

import dataclasses
import itertools
import logging
import math
import random
import time

import numpy as np

from l4jax.engine.config import EngineConfig
from l4jax.engine.input_batch import SampledTokens
from l4jax.engine.ngram_proposer import NgramProposer
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


@dataclasses.dataclass(frozen=True)
class RequestUpdate:
    """What a step brought for one request.

    Attributes:
        finish_reason: "stop" or "length"; "abort" where its time was up, "error" where its step
            failed; None while it goes on.
        prompt_logprobs: of each token of the prompt, the first one's None; with the first tokens,
            where they were asked for.
        cached_tokens: of the prompt, found in the prefix cache.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Stats:
    """How the engine stands, and what it has done since it was made."""

    running: int
    waiting: int
    pages: int  # of all data shards
    pages_used: int  # owned by requests; what the prefix cache holds besides is free
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int  # tokens of prompts that were looked up in the prefix cache
    prefix_hits: int  # of these, found
    drafted: int  # tokens guessed
    accepted: int  # of these, right
    preemptions: int


class Engine:
    """Requests in, tokens out, on a runner that has its weights; allocates the page pool.

    Not thread-safe: one thread calls it.
    """

    def __init__(self, runner: Runner, engine_config: EngineConfig):
        """Raises `CapacityError` where the capacity does not fit in memory."""
        self.runner, self.engine_config = runner, engine_config
        self.limits = runner.reserve(engine_config)
        self.scheduler = Scheduler(
            self.limits,
            keeps_prefixes=engine_config.enable_prefix_caching,
            guess=NgramProposer(engine_config.speculation) if engine_config.speculation else None,
        )
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count()
        self._seeds = random.Random(engine_config.seed)
        self._flight: PendingStep | None = None
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._counts = dict.fromkeys(("prompt", "generation", "queries", "hits"), 0)
        self._guesses = {"drafted": 0, "accepted": 0}

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
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
        """Take a request, for one answer; its id.

        Args:
            token_ids: of the prompt.
            params: how to sample; its n is not looked at.
            images: of the prompt, in order.
            constraints: what the answer must keep to.
            timeout: seconds after which it ends with what it has, as "abort".

        Raises:
            PromptError: for a prompt that cannot be run.
        """
        self.check(token_ids, images, params)
        config = self.runner.config
        room = self.limits.max_length - len(token_ids)
        # A grammar ends with one of them, whoever ignores them otherwise.
        is_endless = params.ignore_eos and (constraints is None or constraints.matcher is None)
        eos_ids = () if is_endless else config.eos_ids
        positions = None
        if images:
            positions = np.flatnonzero(np.array(token_ids) == config.patch_id)
        request = Request(
            id=next(self._ids),
            tokens=list(token_ids),
            prompt_length=len(token_ids),
            max_length=len(token_ids) + min(room, params.max_tokens or room),
            params=params,
            seed=self._seeds.getrandbits(32) if params.seed is None else params.seed,
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
        """Drop a request at any moment, and free what it owns. One that has ended is left alone."""
        request = self._requests.pop(request_id, None)
        self._prompt_logprobs.pop(request_id, None)
        if request is not None:
            request.finish_reason = request.finish_reason or "abort"
            self.scheduler.end(request)

    def step(self) -> list[RequestUpdate]:
        """Start what is next, and say what the step before it brought.

        A failure ends the requests that were in it; those that only waited or were computed before
        are computed again.
        """
        updates = self._expire()
        if self.scheduler.must_know:
            updates += self._land()
        plan, flight = self.scheduler.plan(), None
        if plan is not None:
            try:
                flight = self.runner.dispatch(plan)
            except Exception as error:  # whatever it is, the other requests go on
                return updates + self._land() + self._fail(plan, error)
        landing, self._flight = self._flight, flight
        return updates + self._take(landing)

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile what every request needs now, so that none waits for it; what adjusted ones need
        is compiled while others are served."""
        self.runner.warm_up(progress=progress)

    @property
    def is_compiling(self) -> bool:
        """Whether something is still being compiled, after the warm-up."""
        return self.runner.is_compiling

    def stats(self) -> Stats:
        """How the engine stands."""
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
            drafted=self._guesses["drafted"],
            accepted=self._guesses["accepted"],
            preemptions=self.scheduler.preemptions,
        )

    def check(
        self,
        token_ids: list[int] | tuple[int, ...],
        images: tuple[Tiles, ...] = (),
        params: SamplingParams | None = None,
    ) -> None:
        """Raise `PromptError` for a prompt that cannot be run."""
        config, longest = self.runner.config, self.limits.max_length
        if not token_ids:
            raise PromptError("the prompt is empty: give at least one token.")
        if len(token_ids) >= longest:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, and with the answer {longest} fit: "
                f"shorten it to {longest - 1}, or raise max_model_len."
            )
        vocab = config.text.vocab
        listed = [
            *((params and params.logit_bias) or ()),
            *((params and params.stop_token_ids) or ()),
        ]
        strangers = [token for token in (*token_ids, *listed) if not 0 <= token < vocab]
        if strangers:
            raise PromptError(f"token id {strangers[0]} is not in the vocabulary of {vocab}.")
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
        """End what has run out of time."""
        now = time.monotonic()
        late = [request for request in self._requests.values() if request.deadline < now]
        return [self._end(request, "abort") for request in late]

    def _land(self) -> list[RequestUpdate]:
        """Wait for what is under way."""
        landing, self._flight = self._flight, None
        return self._take(landing)

    def _take(self, landing: PendingStep | None) -> list[RequestUpdate]:
        if landing is None:
            return []
        try:
            drawn = landing.result()
        except Exception as error:  # whatever it is, the other requests go on
            return self._fail(landing.output, error)
        return [update for each in drawn if (update := self._note(each))]

    def _note(self, drawn: SampledTokens) -> RequestUpdate | None:
        """What a request drew becomes part of it; nothing to tell of one that is gone."""
        run, request = drawn.chunk, drawn.chunk.request
        request.pending -= run.draws
        if request.id not in self._requests:
            return None
        known = self._prompt_logprobs.get(request.id)
        if known is not None:  # one that was computed again tells the same once more
            known += drawn.prompt_logprobs[len(known) - drawn.prompt_start :]
        if not drawn.token_ids:
            return None
        if run.drafts:
            self._guesses["drafted"] += len(run.drafts)
            self._guesses["accepted"] += len(drawn.token_ids) - 1
            request.computed -= run.draws - len(drawn.token_ids)
        is_first = len(request.tokens) == request.prompt_length
        tokens = _cut_at_stop(drawn.token_ids, request.stop_ids)
        logprobs = drawn.logprobs[: len(tokens)]
        request.take(tokens)
        if is_first:
            self._counts["prompt"] += request.prompt_length
            self._counts["queries"] += request.prompt_length
            self._counts["hits"] += request.cached or 0
        self._counts["generation"] += len(tokens)
        if request.finish_reason is None and not _follow(request, tokens):
            request.finish_reason = "error"
        update = RequestUpdate(
            request.id,
            tokens,
            logprobs,
            request.finish_reason,
            known if is_first else None,
            request.cached or 0,
        )
        if request.finish_reason is not None:
            self.cancel(request.id)
        return update

    def _fail(self, plan: SchedulerOutput, error: Exception) -> list[RequestUpdate]:
        """End the requests of a plan; all others are computed again, on an empty pool."""
        log.error("a step failed, and with it its requests", exc_info=error)
        self._flight = None
        failed = {run.request.id for shard in plan.runs for run in shard}
        updates = [
            self._end(request, "error")
            for request in list(self._requests.values())
            if request.id in failed
        ]
        for request in self._requests.values():
            request.pending = 0
        for request in list(self.scheduler.running):
            self.scheduler.preempt(request)
        self.scheduler.forget_prefixes()
        self.runner.start()
        return updates

    def _end(self, request: Request, finish_reason: str) -> RequestUpdate:
        """End a request as it stands."""
        request.finish_reason = finish_reason
        self.cancel(request.id)
        return RequestUpdate(request.id, [], [], finish_reason, cached_tokens=request.cached or 0)


def _follow(request: Request, tokens: list[int]) -> bool:
    """Lead a request's grammar, if it has one, through the tokens that were drawn; whether it can
    go on.
    """
    matcher = request.constraints.matcher
    if matcher is None:
        return True
    try:
        is_right = all([matcher.accept(token) for token in tokens])
        matcher.mask()  # where it has outgrown its limits, only this request fails
    except ValueError as error:
        log.error("request %d: %s", request.id, error)
        return False
    return is_right


def _cut_at_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Up to the first stop id: the device watches for the first few of them only."""
    for at, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: at + 1]
    return tokens
