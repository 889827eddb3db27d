"""Which tokens run next, in which pages: pure bookkeeping, no jax.

Those who wait, wait in order of arrival, and are admitted when there are pages for their prompt and
some for the answers of all. A step takes the next token of every request that decodes, then prompt
chunks, up to a budget of tokens. When no prompt is left to run, requests decode many steps at once;
fewer while somebody waits, whose turn comes when one of them ends. Pages are taken as tokens come;
when there are none left, the youngest request gives up its own, waits, and is computed again later:
its tokens so far are kept, so nothing is lost but time. The oldest always goes on.

A plan counts on the plans before it: it is made before their tokens are known. Whatever the device
runs later, it runs in that order, so pages may change hands as soon as a plan is made.
"""

import bisect
import collections
import dataclasses
from collections.abc import Callable

from l4jax.engine.pages import Freelist, PageAllocator
from l4jax.engine.request import Request

_HURRY = 4  # a loop is so many times shorter while somebody waits
_AHEAD = 2  # loops that whoever runs is left pages for before another one is admitted
WHOLE = -1  # the group of the global layers, in the names of pages


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
    drafts: int = 0  # tokens that a row may guess in a step

    def count_pages(self, length: int) -> int:
        """Pages that a request of this length, prompt and output, owns at most."""
        local = -(-min(length, self.chunk) // self.page)
        return -(-length // self.page) + self.local_groups * local


@dataclasses.dataclass(frozen=True)
class ScheduledChunk:
    """A row of a step: tokens start .. stop of a request, in one chunk, and its local pages.

    In a loop, tokens start .. stop are those that it may run.
    """

    request: Request
    start: int
    stop: int
    local_pages: list[list[int]]
    draws: int = 0  # tokens that it draws, at most; of what was guessed, what proves right and one
    drafts: tuple[int, ...] = ()  # what was guessed: the last of its tokens
    feature_slots: tuple[int, ...] = ()  # of the request's image tiles, if they are still needed
    is_first: bool = False  # of the request since it was admitted


@dataclasses.dataclass(frozen=True)
class SchedulerOutput:
    """What to run: the rows of each data shard, in one step or in a loop of decode steps."""

    runs: list[list[ScheduledChunk]]
    is_loop: bool


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a request may begin: the pages of what it finds computed there, and those left over."""

    shard: int
    room: int
    whole: list[int]
    chunks: list[list[int]]


class Scheduler:
    """Requests wait, run, and end; their pages go with them.

    Args:
        limits: what to keep within.
        keeps_prefixes: whether a prompt is searched for what others have computed.
        guess: gives at most so many tokens that may come next in a request; None never guesses.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        keeps_prefixes: bool = True,
        guess: Callable[[Request, int], list[int]] | None = None,
    ):
        self.limits = limits
        self.waiting: collections.deque[Request] = collections.deque()  # in order of arrival
        self.running: list[Request] = []  # in order of arrival
        self.pages = [
            PageAllocator(limits.pages, keeps=keeps_prefixes) for _ in range(limits.shards)
        ]
        self.slots = [Freelist(limits.requests) for _ in range(limits.shards)]
        self.features = Freelist(limits.feature_slots)
        self.preemptions = 0
        self._keeps_prefixes, self._guess = keeps_prefixes, guess

    @property
    def must_know(self) -> bool:
        """Whether all tokens drawn so far have to be known before the next plan."""
        return self._guess is not None or any(request.is_host_driven for request in self.running)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(request)

    def plan(self) -> SchedulerOutput | None:
        """What to run now, admitting whoever fits; None when there is nothing to do."""
        self._admit()
        drafts = self._draft()
        is_loop = not drafts and not any(r.is_prefilling or r.is_host_driven for r in self.running)
        runs: list[list[ScheduledChunk]] = [[] for _ in range(self.limits.shards)]
        # Next tokens first: a long prompt never stalls who decodes. Iterated over a copy, since
        # the youngest may have to leave for an older one.
        for request in list(self.running):
            if not request.is_prefilling and not request.is_complete:
                self._plan_token(request, runs, is_loop, drafts.get(request, ()))
        # Local pages of the chunks that this step completes. They are freed last: a page freed
        # while the step is planned could get a second owner within it, and has no name yet.
        done: list[tuple[int, list[list[int]]]] = []
        for request in list(self.running):
            if request.is_prefilling:
                self._plan_prompt(request, runs, done)
        for run in (run for shard in runs for run in shard):
            run.request.computed = run.stop
            run.request.pending += run.draws
            self._name_pages(run)
            if run.request.feature_slots and run.stop >= run.request.patches_end:
                self._free_features(run.request)
        for shard, groups in done:
            self._give_back(shard, groups)
        return SchedulerOutput(runs, is_loop) if any(runs) else None

    def end(self, request: Request) -> None:
        """Take a request out, wherever it is, and free what it owns."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._release(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's pages; it waits to be computed again."""
        self._release(request)
        request.computed = request.named_blocks = 0
        self.preemptions += 1
        at = bisect.bisect_left([other.id for other in self.waiting], request.id)
        self.waiting.insert(at, request)

    def forget_prefixes(self) -> None:
        """Forget what pages hold: the pool is gone. Nothing may be running."""
        for pages in self.pages:
            pages.forget_all()

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            if request.pending:  # preempted with tokens under way: they will be known soon
                return
            found = [self._find_place(request, shard) for shard in range(self.limits.shards)]
            places = [place for place in found if place is not None]
            if not places:
                return
            # Room counts, and so does what need not be computed again.
            place = max(places, key=lambda place: place.room + len(place.whole))
            length, shard = len(place.whole) * self.limits.page, place.shard
            needs_features = length < request.patches_end
            if needs_features and request.tiles > self.features.free:
                return
            self.waiting.popleft()
            request.shard = shard
            request.slot = shard * self.limits.requests + self.slots[shard].take(1)[0]
            for ids in (place.whole, *place.chunks):
                self.pages[shard].share(ids)
            request.global_pages, request.local_pages = place.whole, place.chunks
            request.computed, request.named_blocks = length, length // self.limits.page
            if request.cached is None:
                request.cached = length
            if needs_features:
                request.feature_slots = self.features.take(request.tiles)
            request.is_fresh = True
            bisect.insort(self.running, request, key=lambda other: other.id)

    def _find_place(self, request: Request, shard: int) -> "_Place | None":
        """Where a request would begin in a shard; None if there is no room for its tokens besides
        those of who runs there, and for what they all will draw next: else the last to come would
        soon have to leave, and all that it had computed would be lost.
        """
        if not self.slots[shard].free:
            return None
        pages, ahead = self.pages[shard], _AHEAD * self.limits.loop_steps

        def count(its: Request) -> int:
            return self.limits.count_pages(min(its.length + ahead, its.max_length))

        promised = sum(
            max(0, count(other) - self._count_owned(other))
            for other in self.running
            if other.shard == shard
        )
        whole, chunks = self._find_hit(request, shard)
        found = (whole, *chunks)
        needed = count(request) - sum(len(ids) - pages.count_idle(ids) for ids in found)
        room = pages.free - promised - needed
        return _Place(shard, room, whole, chunks) if room >= 0 else None

    def _find_hit(self, request: Request, shard: int) -> tuple[list[int], list[list[int]]]:
        """The pages that hold what a request's tokens begin with: global, and of each local group
        those of the last chunk.

        At the beginning of a chunk the global layers' pages suffice; within it the local ones have
        to be there, too. The last token is always left: somebody has to say what comes next.
        """
        limits, pages = self.limits, self.pages[shard]
        whole, chunks = [], self._make_groups()
        if not self._keeps_prefixes or request.params.prompt_logprobs is not None:
            return whole, chunks
        for block in range((len(request.tokens) - 1) // limits.page):
            page = pages.find((WHOLE, request.hash_block(block, limits.page)))
            if page is None:
                break
            whole.append(page)
        first = len(whole) * limits.page // limits.chunk * limits.chunk // limits.page
        for block in range(first, len(whole)):
            name = request.hash_block(block, limits.page)
            ids = [pages.find((group, name)) for group in range(limits.local_groups)]
            if None in ids:
                break
            for group, page in zip(chunks, ids, strict=True):
                group.append(page)  # type: ignore[arg-type]
        return whole[: first + len(chunks[0])], chunks

    def _draft(self) -> dict[Request, tuple[int, ...]]:
        """What may come next in each request that decodes: within its chunk, its length, and the
        tokens of a step.

        What is guessed never crosses into another chunk: its local pages would take the place of
        those that are still needed if the guess is wrong.
        """
        if self._guess is None:
            return {}
        limits, found = self.limits, {}
        rooms = [limits.tokens - limits.requests] * limits.shards
        for request in self.running:
            # What a penalty or a grammar does to a token depends on those just before it.
            is_history = request.params.has_penalties or request.is_host_driven
            if request.is_prefilling or request.is_complete or is_history:
                continue
            at = request.computed
            room = min(
                limits.drafts,
                limits.chunk - 1 - at % limits.chunk,
                request.max_length - at - 2,
                rooms[request.shard],
            )
            guess = tuple(self._guess(request, room)) if room > 0 else ()
            if guess:
                found[request] = guess
                rooms[request.shard] -= len(guess)
        return found

    def _plan_token(
        self,
        request: Request,
        runs: list[list[ScheduledChunk]],
        is_loop: bool,
        drafts: tuple[int, ...],
    ) -> None:
        """The row of a request that decodes, if there are pages for it."""
        limits, at = self.limits, request.computed
        if request not in self.running:
            return
        self._enter_chunk(request, at)
        steps = 1 + len(drafts)
        if is_loop:
            left = limits.chunk - at % limits.chunk
            most = limits.loop_steps if not self.waiting else -(-limits.loop_steps // _HURRY)
            steps = min(most, left, request.max_length - at - 1)
            if self._count_missing(request, at, at + steps) > self.pages[request.shard].free:
                steps = 1
        if self._grow(request, at, at + steps, runs):
            run = ScheduledChunk(
                request,
                at,
                at + steps,
                request.local_pages,
                draws=steps,
                drafts=drafts,
                is_first=request.is_fresh,
            )
            request.is_fresh = False
            runs[request.shard].append(run)

    def _plan_prompt(
        self,
        request: Request,
        runs: list[list[ScheduledChunk]],
        done: list[tuple[int, list[list[int]]]],
    ) -> None:
        """The next rows of a prompt: one a chunk, as many as the step's tokens, rows and pages
        allow.

        The first goes on in the chunk pages that the request owns. Each further one takes its own,
        since all run in one step; the request keeps the last one's.
        """
        limits, planned = self.limits, runs[request.shard]
        at, length = request.computed, len(request.tokens)
        is_first = True
        while at < length and request in self.running and len(planned) < limits.rows:
            budget = limits.tokens - sum(run.stop - run.start for run in planned)
            stop = min(length, at + budget, (at // limits.chunk + 1) * limits.chunk)
            if stop == at:
                return
            if is_first:
                self._enter_chunk(request, at)
                if not self._grow(request, at, stop, runs):
                    return
            else:
                old, request.local_pages = request.local_pages, self._make_groups()
                done.append((request.shard, old))
                # It must not cost others their pages: it can wait for its turn.
                if not self._grow_if_free(request, at, stop):
                    return
            planned.append(
                ScheduledChunk(
                    request,
                    at,
                    stop,
                    request.local_pages,
                    draws=int(stop == length),
                    feature_slots=tuple(request.feature_slots),
                    is_first=request.is_fresh,
                )
            )
            request.is_fresh = is_first = False
            at = stop
            if at % limits.chunk:  # one row a chunk, even if somebody's leaving made room for more
                return

    def _enter_chunk(self, request: Request, at: int) -> None:
        """Give the pages of the chunk before back, where position `at` is the first of its own."""
        if at % self.limits.chunk == 0:
            self._give_back(request.shard, request.local_pages)
            request.local_pages = self._make_groups()

    def _grow(self, request: Request, at: int, stop: int, runs: list[list[ScheduledChunk]]) -> bool:
        """Own the pages of positions at .. stop; the youngest make room. False if that is it."""
        while not self._grow_if_free(request, at, stop):
            youngest = [other for other in self.running if other.shard == request.shard][-1]
            runs[request.shard][:] = [
                run for run in runs[request.shard] if run.request is not youngest
            ]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True

    def _grow_if_free(self, request: Request, at: int, stop: int) -> bool:
        pages = self.pages[request.shard]
        if self._count_missing(request, at, stop) > pages.free:
            return False
        whole, local = self._count_new(request, at, stop)
        request.global_pages += pages.take(whole)
        for group in request.local_pages:
            group += pages.take(local)
        return True

    def _count_missing(self, request: Request, at: int, stop: int) -> int:
        whole, local = self._count_new(request, at, stop)
        return whole + self.limits.local_groups * local

    def _count_new(self, request: Request, at: int, stop: int) -> tuple[int, int]:
        """Pages that positions at .. stop of one chunk need beyond those owned: global, local."""
        page, chunk = self.limits.page, self.limits.chunk
        whole = -(-stop // page) - len(request.global_pages)
        local = -(-(stop - at // chunk * chunk) // page) - len(request.local_pages[0])
        return max(0, whole), max(0, local)

    def _name_pages(self, run: ScheduledChunk) -> None:
        """Tell the prefix cache what the pages hold that a run fills."""
        if not self._keeps_prefixes:
            return
        request, page, chunk = run.request, self.limits.page, self.limits.chunk
        pages, first = self.pages[request.shard], run.start // chunk * chunk // page
        blocks = min(run.stop, len(request.tokens)) // page
        for block in range(request.named_blocks, blocks):
            name = request.hash_block(block, page)
            pages.name(request.global_pages[block], (WHOLE, name))
            if block >= first:  # else those of a chunk before, named too late
                for group, ids in enumerate(run.local_pages):
                    pages.name(ids[block - first], (group, name))
        request.named_blocks = max(request.named_blocks, blocks)

    def _release(self, request: Request) -> None:
        """Take a request out of those that run, with all that it owns."""
        self.running.remove(request)
        self.slots[request.shard].give_back([request.slot - request.shard * self.limits.requests])
        self._give_back(request.shard, [request.global_pages, *request.local_pages])
        request.global_pages, request.local_pages = [], []
        self._free_features(request)

    def _free_features(self, request: Request) -> None:
        self.features.give_back(request.feature_slots)
        request.feature_slots = []

    def _give_back(self, shard: int, groups: list[list[int]]) -> None:
        for ids in groups:
            self.pages[shard].give_back(ids)

    def _make_groups(self) -> list[list[int]]:
        return [[] for _ in range(self.limits.local_groups)]

    def _count_owned(self, request: Request) -> int:
        return len(request.global_pages) + sum(map(len, request.local_pages))
