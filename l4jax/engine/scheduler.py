"""Which tokens run next, in which pages: pure bookkeeping, no jax.

A request gets all the pages that it can ever need at admission, so nothing that runs is ever short
of them; those who wait, wait in order of arrival. A step takes the next token of every request that
decodes, then prompt chunks, up to a budget of tokens. When no prompt is left to run, requests
decode many steps at once.
"""

import collections
import dataclasses

from l4jax.engine.pages import Freelist
from l4jax.engine.request import Request


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the scheduler must keep within: of each data shard, where nothing else is said."""

    shards: int
    requests: int
    pages: int
    tokens: int  # of a step
    rows: int  # of a step
    feature_slots: int  # of all shards together
    page: int  # positions
    chunk: int  # positions
    local_groups: int
    loop_steps: int
    max_length: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of a step: tokens start .. stop of a request, in one chunk, and its local pages."""

    request: Request
    start: int
    stop: int
    chunk_pages: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: the rows of each data shard, in one step or in a loop of decode steps."""

    runs: list[list[Run]]
    is_loop: bool

    def count_limit(self, run: Run, limits: Limits) -> int:
        """Tokens that a row may choose in a loop: up to the end of its chunk, or its length."""
        at = run.start
        return min(
            limits.loop_steps, limits.chunk - at % limits.chunk, run.request.max_length - at - 1
        )


class Scheduler:
    """Requests wait, run, and end; their pages go with them."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self.pages = [Freelist(limits.pages) for _ in range(limits.shards)]
        self.features = Freelist(limits.feature_slots)

    def count_pages(self, length: int) -> int:
        """Pages that a request of this length, prompt and output, owns."""
        limits = self.limits
        whole = -(-length // limits.page)
        return whole + limits.local_groups * self._count_chunk_pages(length)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(request)

    def plan(self) -> Plan | None:
        """What to run now, admitting whoever fits; None when there is nothing to do."""
        self._admit()
        if not self.running:
            return None
        is_loop = not any(request.is_prefilling for request in self.running)
        runs: list[list[Run]] = [[] for _ in range(self.limits.shards)]
        for request in self.running:  # next tokens first: a long prompt never stalls who decodes
            if not request.is_prefilling:
                at = request.computed
                runs[request.shard].append(Run(request, at, at + 1, request.chunk_pages))
        # Local pages of the chunks that this step completes, with their shard.
        done: list[tuple[int, list[list[int]]]] = []
        for request in self.running:
            if request.is_prefilling:
                for run in self._cut_prompt(request, runs[request.shard]):
                    runs[request.shard].append(run)
                    if run.chunk_pages is not request.chunk_pages:
                        done.append((request.shard, run.chunk_pages))
        # Only now: freed while the step is planned, a page could get a second owner within it.
        for shard, groups in done:
            for group in groups:
                self.pages[shard].give_back(group)
        return Plan(runs, is_loop)

    def end(self, request: Request) -> None:
        """Take a request out, wherever it is, and free what it owns."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self.running.remove(request)
            pages = self.pages[request.shard]
            pages.give_back(request.whole_pages)
            for group in request.chunk_pages:
                pages.give_back(group)
            request.whole_pages, request.chunk_pages = [], []
            self.free_features(request)

    def free_features(self, request: Request) -> None:
        """Free the image features of a request, whose prompt has been run."""
        self.features.give_back(request.feature_slots)
        request.feature_slots = []

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            shard = max(range(self.limits.shards), key=lambda s: self.pages[s].free)
            residents = sum(other.shard == shard for other in self.running)
            has_room = self.count_pages(request.max_length) <= self.pages[shard].free
            if (
                not has_room
                or residents >= self.limits.requests
                or request.tiles > self.features.free
            ):
                return
            self.waiting.popleft()
            request.shard = shard
            request.whole_pages = self.pages[shard].take(-(-request.max_length // self.limits.page))
            request.chunk_pages = self._take_chunk(request)
            request.feature_slots = self.features.take(request.tiles)
            self.running.append(request)

    def _cut_prompt(self, request: Request, planned: list[Run]) -> list[Run]:
        """The next rows of a prompt: one a chunk, as many as the step's tokens, rows and pages
        allow.

        The first goes on in the chunk pages that the request owns. Each further one takes its own,
        since all run in one step; the request keeps the last one's.
        """
        limits, runs = self.limits, []
        budget = limits.tokens - sum(run.stop - run.start for run in planned)
        at, stop = request.computed, min(request.computed + budget, request.prompt_length)
        while at < stop and len(planned) + len(runs) < limits.rows:
            if runs:
                needed = limits.local_groups * self._count_chunk_pages(request.max_length)
                if needed > self.pages[request.shard].free:
                    break
                request.chunk_pages = self._take_chunk(request)
            end = min(stop, (at // limits.chunk + 1) * limits.chunk)
            runs.append(Run(request, at, end, request.chunk_pages))
            at = end
        return runs

    def _take_chunk(self, request: Request) -> list[list[int]]:
        count = self._count_chunk_pages(request.max_length)
        return [self.pages[request.shard].take(count) for _ in range(self.limits.local_groups)]

    def _count_chunk_pages(self, length: int) -> int:
        return -(-min(length, self.limits.chunk) // self.limits.page)
