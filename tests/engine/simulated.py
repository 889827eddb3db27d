"""A runner without a device: it keeps pages as the pool does, and draws from what they hold.

What it draws depends on every token before, as found in the pages: one that was overwritten,
shared with the wrong request, or never written changes the answer.
"""

import dataclasses
import itertools
import random
import types

from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.input_batch import SampledTokens, _count_accepted
from l4jax.engine.request import Request, SamplingParams
from l4jax.engine.scheduler import Limits, ScheduledChunk, SchedulerOutput

VOCAB = 50
PRIME = 2**31 - 1
EMPTY = 987_654_321  # what nobody has written


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


def continue_alone(prompt: list[int], count: int, chunk: int) -> list[int]:
    """What a request draws when it has a machine of its own."""
    tokens, states = list(prompt), []
    while len(tokens) < len(prompt) + count:
        for position in range(len(states), len(tokens)):
            within = states[position // chunk * chunk :]
            states.append(mix(tokens[position], position, sum(states) % PRIME, sum(within) % PRIME))
        tokens.append(states[-1] % VOCAB)
    return tokens[len(prompt) :]


@dataclasses.dataclass
class SimulatedFlight:
    plan: SchedulerOutput
    drawn: list[SampledTokens]

    def land(self) -> list[SampledTokens]:
        return self.drawn


class BrokenPlan(BaseException):
    """A plan that no device could run. The engine, which survives exceptions, does not this."""


class SimulatedRunner:
    """Plans run at once, in order, and their tokens are read when the engine asks for them."""

    def __init__(self, limits: Limits, eos_ids: tuple[int, ...] = ()):
        self.limits = limits
        self.config = types.SimpleNamespace(
            eos_ids=eos_ids, vision=None, patch_id=None, text=types.SimpleNamespace(vocab=VOCAB)
        )
        self.plans: list[SchedulerOutput] = []
        self.fails: set[int] = set()  # dispatches that fail
        self.start()

    def reserve(self, engine_config: EngineConfig) -> Limits:
        return self.limits

    def start(self) -> None:
        self.memory: dict[tuple[int, int, int, int], int] = {}
        self.last: dict[int, int] = {}

    def dispatch(self, plan: SchedulerOutput) -> SimulatedFlight:
        self.plans.append(plan)
        if len(self.plans) in self.fails:
            raise RuntimeError("the device is on fire")
        try:
            check_plan(plan, self.limits)
            run = self._loop if plan.is_loop else self._step
            return SimulatedFlight(plan, [run(each) for shard in plan.runs for each in shard])
        except Exception as error:
            raise BrokenPlan(plan) from error

    def _step(self, run: ScheduledChunk) -> SampledTokens:
        request, drawn = run.request, []
        known = request.tokens[run.start : run.stop - len(run.drafts)]
        tokens = [*(known or [self.last[request.slot]]), *run.drafts]
        for position, token in zip(range(run.start, run.stop), tokens, strict=True):
            state = self._advance(run, position, token)
            if position >= run.stop - run.draws:
                drawn.append(state % VOCAB)
        if drawn:
            self.last[request.slot] = drawn[0]
        return SampledTokens(run, drawn[: _count_accepted(drawn, run.drafts) + 1])

    def _loop(self, run: ScheduledChunk) -> SampledTokens:
        request, drawn, at = run.request, [], run.start
        token = request.tokens[at] if at < len(request.tokens) else self.last[request.slot]
        has_ended = at >= len(request.tokens) and token in request.stop_ids
        while len(drawn) < run.draws and not has_ended:
            token = self._advance(run, at, token) % VOCAB
            drawn.append(token)
            at += 1
            has_ended = token in request.stop_ids
        self.last[request.slot] = token
        return SampledTokens(run, drawn)

    def _advance(self, run: ScheduledChunk, position: int, token: int) -> int:
        """Run a token: all that came before is read from the pages, and its own is written."""
        page, chunk = self.limits.page, self.limits.chunk
        shard, first = run.request.shard, position // chunk * chunk

        def place(at: int, group: int) -> tuple[int, int, int]:
            if group < 0:
                return shard, run.request.global_pages[at // page], at % page
            return shard, run.local_pages[group][(at - first) // page], at % page

        seen = sum(self.memory.get(place(at, -1), EMPTY) for at in range(position)) % PRIME
        local = {
            sum(self.memory.get(place(at, group), EMPTY) - group for at in range(first, position))
            for group in range(self.limits.local_groups)
        }
        assert len(local) == 1, "the local groups disagree"
        state = mix(token, position, seen, local.pop() % PRIME)
        for group in range(-1, self.limits.local_groups):
            self.memory[place(position, group)] = state + max(group, 0)
        return state


def make_engine(limits: Limits, *, keeps: bool = True, guess=None, **runner) -> Engine:
    engine = Engine(SimulatedRunner(limits, **runner), EngineConfig(enable_prefix_caching=keeps))
    engine.scheduler._guess = guess
    return engine


def check_plan(plan: SchedulerOutput, limits: Limits) -> None:
    """What has to hold of every plan."""
    for shard, runs in enumerate(plan.runs):
        assert sum(run.stop - run.start for run in runs) <= limits.tokens or plan.is_loop
        assert len(runs) <= limits.rows
        written: dict[int, int] = {}
        for run in runs:
            request = run.request
            assert request.shard == shard
            assert run.start // limits.chunk == (run.stop - 1) // limits.chunk  # one chunk a row
            assert run.draws <= max(limits.loop_steps, 1 + limits.drafts)
            assert len(request.global_pages) * limits.page >= run.stop
            for page in find_written(run, limits):  # a page that is written has one row
                assert page not in written, f"page {page} has two rows"
                written[page] = request.id
        numbers = [number for number, _ in itertools.groupby(run.request.id for run in runs)]
        assert len(numbers) == len(set(numbers))  # the rows of a request stand side by side
        for run in runs:  # and nobody else reads it
            for page in set(find_read(run)) & set(written):
                assert written[page] == run.request.id


def find_written(run: ScheduledChunk, limits: Limits) -> list[int]:
    first = run.start // limits.chunk * limits.chunk
    whole = run.request.global_pages[run.start // limits.page : -(-run.stop // limits.page)]
    here = slice((run.start - first) // limits.page, -(-(run.stop - first) // limits.page))
    # The first page of a row may be written by the row before it, of the same request.
    return [*whole, *(page for group in run.local_pages for page in group[here])]


def find_read(run: ScheduledChunk) -> list[int]:
    return [*run.request.global_pages, *(page for group in run.local_pages for page in group)]


def make_params(count: int, **changes) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **changes)


def guess_by_chance(seed: int, chunk: int):
    """Right guesses and wrong ones, in any mix."""
    rng = random.Random(seed)

    def guess(request: Request, count: int) -> list[int]:
        right = continue_alone(request.tokens, count, chunk)
        right = right[: rng.randrange(count + 1)]
        if right and rng.random() < 0.5:
            right[-1] = rng.randrange(VOCAB)
        return right

    return guess


def drain(engine: Engine, max_steps: int = 3000) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return found
        for update in engine.step():
            found.setdefault(update.request_id, []).extend(update.token_ids)
    raise AssertionError("somebody starves")
