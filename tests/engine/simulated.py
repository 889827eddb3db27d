"""A runner without a device: it stores values in pages, and samples tokens from these values.

A sampled token depends on all tokens before it, as read from the pages. A page that was
overwritten, shared with the wrong request, or never written changes the output.
"""

import dataclasses
import itertools
import random
import types
from typing import Any

from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.output_batch import SampledTokens, count_accepted
from l4jax.engine.request import Request, SamplingParams
from l4jax.engine.scheduler import Limits, ScheduledChunk, SchedulerOutput

VOCAB = 50
PRIME = 2**31 - 1
EMPTY = 987_654_321  # the value of unwritten positions


def make_limits(**changes) -> Limits:
    limits = {
        "shards": 1,
        "requests": 4,
        "pages": 60,
        "tokens": 20,
        "rows": 8,
        "feature_slots": 0,
        "page": 2,
        "chunk": 8,
        "local_groups": 3,
        "loop_steps": 8,
        "max_length": 64,
    }
    return Limits(**{**limits, **changes})


def mix(token: int, position: int, seen: int, local: int) -> int:
    return ((token + 1) * 1_000_003 + position * 7919 + seen * 31 + local * 101) % PRIME


def complete(prompt: list[int], count: int, chunk: int) -> list[int]:
    """Return the output of a request at batch size 1."""
    tokens, states = list(prompt), []
    while len(tokens) < len(prompt) + count:
        for position in range(len(states), len(tokens)):
            within = states[position // chunk * chunk :]
            states.append(mix(tokens[position], position, sum(states) % PRIME, sum(within) % PRIME))
        tokens.append(states[-1] % VOCAB)
    return tokens[len(prompt) :]


@dataclasses.dataclass
class SimulatedStep:
    scheduler_output: SchedulerOutput
    sampled: list[SampledTokens]

    def result(self) -> list[SampledTokens]:
        return self.sampled


class InvalidOutput(BaseException):
    """Scheduler output that no device could run. The engine catches exceptions, but not this."""


class SimulatedRunner:
    """Steps run when they are dispatched; the engine reads their results later."""

    def __init__(self, limits: Limits, eos_ids: tuple[int, ...] = ()):
        self.limits = limits
        self.config = types.SimpleNamespace(
            eos_ids=eos_ids, vision=None, patch_id=None, text=types.SimpleNamespace(vocab=VOCAB)
        )
        self.outputs: list[SchedulerOutput] = []
        self.fails: set[int] = set()  # numbers of dispatches that fail
        self.reset_state()

    def allocate_kv_cache(self, engine_config: EngineConfig) -> Limits:
        return self.limits

    def reset_state(self) -> None:
        self.pool: dict[tuple[int, int, int, int], int] = {}
        self.last_tokens: dict[int, int] = {}

    def dispatch(self, output: SchedulerOutput) -> SimulatedStep:
        self.outputs.append(output)
        if len(self.outputs) in self.fails:
            raise RuntimeError("the device is on fire")
        try:
            check_output(output, self.limits)
            run = self._loop if output.is_loop else self._step
            return SimulatedStep(output, [run(chunk) for shard in output.chunks for chunk in shard])
        except Exception as error:
            raise InvalidOutput(output) from error

    def _step(self, chunk: ScheduledChunk) -> SampledTokens:
        request, sampled = chunk.request, []
        known = request.tokens[chunk.start : chunk.stop - len(chunk.drafts)]
        tokens = [*(known or [self.last_tokens[request.slot]]), *chunk.drafts]
        for position, token in zip(range(chunk.start, chunk.stop), tokens, strict=True):
            state = self._advance(chunk, position, token)
            if position >= chunk.stop - chunk.max_sampled:
                sampled.append(state % VOCAB)
        if sampled:
            self.last_tokens[request.slot] = sampled[0]
        return SampledTokens(chunk, sampled[: count_accepted(sampled, chunk.drafts) + 1])

    def _loop(self, chunk: ScheduledChunk) -> SampledTokens:
        request, sampled, at = chunk.request, [], chunk.start
        token = request.tokens[at] if at < len(request.tokens) else self.last_tokens[request.slot]
        has_ended = at >= len(request.tokens) and token in request.stop_ids
        while len(sampled) < chunk.max_sampled and not has_ended:
            token = self._advance(chunk, at, token) % VOCAB
            sampled.append(token)
            at += 1
            has_ended = token in request.stop_ids
        self.last_tokens[request.slot] = token
        return SampledTokens(chunk, sampled)

    def _advance(self, chunk: ScheduledChunk, position: int, token: int) -> int:
        """Run a token: read the values of all positions before it from the pages, write its own."""
        page, length = self.limits.page, self.limits.chunk
        size, stripes = self.limits.geometry.global_page, self.limits.stripes
        shard, first = chunk.request.shard, position // length * length

        def locate(at: int, group: int) -> list[tuple[int, int, int, int]]:
            """Find the shard, page, stripe and slot of a position: all copies of local ones."""
            if group < 0:
                column, within = divmod(at, size)
                return [(shard, chunk.request.global_pages[column], *divmod(within, page))]
            local = chunk.local_pages[group][(at - first) // page]
            return [(shard, local, stripe, (at - first) % page) for stripe in range(stripes)]

        def read(at: int, group: int) -> int:
            (value,) = {self.pool.get(key, EMPTY) for key in locate(at, group)}
            return value

        seen = sum(read(at, -1) for at in range(position)) % PRIME
        local = {
            sum(read(at, group) - group for at in range(first, position))
            for group in range(self.limits.local_groups)
        }
        assert len(local) == 1, "the local groups differ"
        state = mix(token, position, seen, local.pop() % PRIME)
        for group in range(-1, self.limits.local_groups):
            for key in locate(position, group):
                self.pool[key] = state + max(group, 0)
        return state


class SimulatedEngine(Engine):
    """An engine on a simulated runner, whose attributes tests read."""

    runner: SimulatedRunner  # pyright: ignore[reportIncompatibleVariableOverride]


def make_engine(
    limits: Limits, *, enable_prefix_caching: bool = True, proposer=None, **runner
) -> SimulatedEngine:
    engine_config = EngineConfig(enable_prefix_caching=enable_prefix_caching)
    simulated: Any = SimulatedRunner(limits, **runner)
    engine = SimulatedEngine(simulated, engine_config)
    engine.scheduler._proposer = proposer
    return engine


def check_output(output: SchedulerOutput, limits: Limits) -> None:
    """Check the invariants of scheduler output."""
    for shard, chunks in enumerate(output.chunks):
        assert sum(chunk.stop - chunk.start for chunk in chunks) <= limits.tokens or output.is_loop
        assert len(chunks) <= limits.rows
        written: dict[int, int] = {}
        for chunk in chunks:
            request = chunk.request
            assert request.shard == shard
            assert chunk.start // limits.chunk == (chunk.stop - 1) // limits.chunk  # one per row
            assert chunk.max_sampled <= max(limits.loop_steps, 1 + limits.drafts)
            assert len(request.global_pages) * limits.geometry.global_page >= chunk.stop
            for page in find_written(chunk, limits):  # one row writes a page
                assert page not in written, f"page {page} has two rows"
                written[page] = request.id
        numbers = [number for number, _ in itertools.groupby(chunk.request.id for chunk in chunks)]
        assert len(numbers) == len(set(numbers))  # the rows of a request are adjacent
        for chunk in chunks:  # no other request reads a written page
            for page in set(find_read(chunk)) & set(written):
                assert written[page] == chunk.request.id


def find_written(chunk: ScheduledChunk, limits: Limits) -> list[int]:
    first = chunk.start // limits.chunk * limits.chunk
    size = limits.geometry.global_page
    blocks = slice(chunk.start // size, -(-chunk.stop // size))
    here = slice((chunk.start - first) // limits.page, -(-(chunk.stop - first) // limits.page))
    # The previous row of the same request may write the first page of a row, too.
    local = [page for group in chunk.local_pages for page in group[here]]
    return [*chunk.request.global_pages[blocks], *local]


def find_read(chunk: ScheduledChunk) -> list[int]:
    return [*chunk.request.global_pages, *(page for group in chunk.local_pages for page in group)]


def make_params(count: int, **changes) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **changes)


def propose_randomly(seed: int, chunk: int):
    """Return a proposer of right drafts and wrong ones, in any mix."""
    rng = random.Random(seed)

    def propose(request: Request, count: int) -> list[int]:
        drafts = complete(request.tokens, count, chunk)
        drafts = drafts[: rng.randrange(count + 1)]
        if drafts and rng.random() < 0.5:
            drafts[-1] = rng.randrange(VOCAB)
        return drafts

    return propose


def drain(engine: Engine, max_steps: int = 3000) -> dict[int, list[int]]:
    """Run all requests to their ends; return their output tokens."""
    found: dict[int, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return found
        for update in engine.step():
            found.setdefault(update.request_id, []).extend(update.token_ids)
    raise AssertionError("a request starves")
