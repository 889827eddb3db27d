"""The scheduler: which tokens run next, in which pages. Pure bookkeeping, no jax.

Requests wait in order of arrival. A request is admitted when there are pages for its prompt and
some for the next output tokens of all running requests. A step takes the next token of every
decoding request, then prompt chunks, up to a token budget. Once no prompt is left to prefill,
requests decode many steps in one device loop; fewer while requests wait, because a waiting request
is admitted when a running one ends.

Pages are allocated as tokens come. When none are free, the youngest request is preempted: it
releases its pages, waits, and is computed again later. Its tokens are kept, so only time is lost.
The oldest request always goes on.

A step is scheduled before the sampled tokens of the last one are known. The device runs steps in
order, so pages may change owners as soon as a step is scheduled.
"""

import bisect
import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

from l4jax.engine.page_geometry import PageGeometry
from l4jax.engine.pages import Freelist, PageAllocator
from l4jax.engine.request import Request

_WAITING_DIVISOR = 4  # a loop is this many times shorter while requests wait
_LOOPS_AHEAD = 2  # loops for which running requests keep pages before another one is admitted
GLOBAL_GROUP = -1  # group of the global layers, in cache keys of pages

Proposer: TypeAlias = Callable[[Request, int], list[int]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes that the scheduler keeps within: of each data shard, unless stated otherwise."""

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
    drafts: int = 0  # draft tokens of a row in a step, at most
    stripes: int = 1  # devices that share a global page

    @functools.cached_property
    def geometry(self) -> PageGeometry:
        """The page counts of requests."""
        return PageGeometry(self.page, self.chunk, self.local_groups, self.stripes)


@dataclasses.dataclass(frozen=True)
class ScheduledChunk:
    """A row of a step: tokens start .. stop of a request, in one attention chunk.

    In a loop, tokens start .. stop are the most that may run.
    """

    request: Request
    start: int
    stop: int
    local_pages: list[list[int]]  # of each local group
    max_sampled: int = 0  # sampled tokens, at most; with drafts, the accepted ones and one
    drafts: tuple[int, ...] = ()  # the last of its tokens
    feature_slots: tuple[int, ...] = ()  # of the request's image tiles, while they are needed
    is_first: bool = False  # of the request since it was admitted


@dataclasses.dataclass(frozen=True)
class SchedulerOutput:
    """The rows of each data shard, for one step or for a loop of decode steps."""

    chunks: list[list[ScheduledChunk]]
    is_loop: bool


@dataclasses.dataclass(frozen=True)
class _Placement:
    """A data shard that can admit a request: its prefix cache hit, and the pages left over."""

    shard: int
    spare_pages: int
    global_pages: list[int]
    local_pages: list[list[int]]


class Scheduler:
    """Waiting and running requests, and the pages that they own.

    Args:
        limits: sizes to keep within.
        enable_prefix_caching: whether prompts share pages with the same beginning.
        proposer: drafts at most n tokens that may come next in a request; None drafts nothing.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        enable_prefix_caching: bool = True,
        proposer: Proposer | None = None,
    ):
        self.limits = limits
        self.waiting: collections.deque[Request] = collections.deque()  # in order of arrival
        self.running: list[Request] = []  # in order of arrival
        self.pages = [
            PageAllocator(limits.pages, enable_caching=enable_prefix_caching)
            for _ in range(limits.shards)
        ]
        self.slots = [Freelist(limits.requests) for _ in range(limits.shards)]
        self.features = Freelist(limits.feature_slots)
        self.preemptions = 0
        self._enable_prefix_caching, self._proposer = enable_prefix_caching, proposer

    @property
    def needs_sampled_tokens(self) -> bool:
        """True if all sampled tokens must be known before the next step is scheduled."""
        return self._proposer is not None or any(r.is_host_driven for r in self.running)

    def add(self, request: Request) -> None:
        """Add a request to the waiting ones."""
        self.waiting.append(request)

    def schedule(self) -> SchedulerOutput | None:
        """Admit requests, and return the next step or loop; None if there is nothing to do."""
        self._admit()
        drafts = self._propose_drafts()
        is_loop = not drafts and not any(r.is_prefilling or r.is_host_driven for r in self.running)
        chunks: list[list[ScheduledChunk]] = [[] for _ in range(self.limits.shards)]
        # Decoding requests come first, so that a long prompt never stalls them. The loop runs over
        # a copy: an older request may preempt the youngest.
        for request in list(self.running):
            if not request.is_prefilling and not request.is_complete:
                self._schedule_decode(request, chunks, is_loop, drafts.get(request, ()))
        # Local pages of the chunks that this step completes. They are released last: a page that is
        # released while the step is scheduled could get a second owner within it, before it is
        # cached.
        completed: list[tuple[int, list[list[int]]]] = []
        for request in list(self.running):
            if request.is_prefilling:
                self._schedule_prefill(request, chunks, completed)
        for chunk in (chunk for shard in chunks for chunk in shard):
            chunk.request.computed = chunk.stop
            chunk.request.pending += chunk.max_sampled
            self._cache_pages(chunk)
            if chunk.request.feature_slots and chunk.stop >= chunk.request.patches_end:
                self._release_features(chunk.request)
        for shard, groups in completed:
            self._release_pages(shard, groups)
        return SchedulerOutput(chunks, is_loop) if any(chunks) else None

    def finish(self, request: Request) -> None:
        """Remove a waiting or running request, and release what it owns."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._release(request)

    def preempt(self, request: Request) -> None:
        """Release a running request's pages; it waits to be computed again."""
        self._release(request)
        request.computed = request.cached_blocks = 0
        self.preemptions += 1
        index = bisect.bisect_left([other.id for other in self.waiting], request.id)
        self.waiting.insert(index, request)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, when the pool is lost. No request may be running."""
        for pages in self.pages:
            pages.reset_cache()

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            if request.pending:  # preempted before its sampled tokens were known; they come soon
                return
            found = [self._find_placement(request, shard) for shard in range(self.limits.shards)]
            placements = [placement for placement in found if placement is not None]
            if not placements:
                return
            # Free pages count, and so do pages that need not be computed again.
            best = max(placements, key=lambda found: found.spare_pages + len(found.global_pages))
            length, shard = len(best.global_pages) * self.limits.geometry.global_page, best.shard
            needs_features = length < request.patches_end
            if needs_features and request.tiles > self.features.free:
                return
            self.waiting.popleft()
            request.shard = shard
            request.slot = shard * self.limits.requests + self.slots[shard].allocate(1)[0]
            for ids in (best.global_pages, *best.local_pages):
                self.pages[shard].share(ids)
            request.global_pages, request.local_pages = best.global_pages, best.local_pages
            request.computed, request.cached_blocks = length, len(best.global_pages)
            if request.cached_tokens is None:
                request.cached_tokens = length
            if needs_features:
                request.feature_slots = self.features.allocate(request.tiles)
            request.is_fresh = True
            bisect.insort(self.running, request, key=lambda other: other.id)

    def _find_placement(self, request: Request, shard: int) -> _Placement | None:
        """Return a request's placement in a shard; None if its pages do not fit.

        Pages must suffice for the request, for the running requests of the shard, and for the next
        output tokens of all of them. Otherwise the last request to be admitted would soon be
        preempted, and its computation lost.
        """
        if not self.slots[shard].free:
            return None
        pages, ahead = self.pages[shard], _LOOPS_AHEAD * self.limits.loop_steps

        def count(its: Request) -> int:
            return self.limits.geometry.count(min(its.length + ahead, its.max_length))

        reserved = sum(
            max(0, count(other) - other.owned_pages)
            for other in self.running
            if other.shard == shard
        )
        global_pages, local_pages = self._find_prefix(request, shard)
        hits = (global_pages, *local_pages)
        needed = count(request) - sum(len(ids) - pages.count_evictable(ids) for ids in hits)
        spare = pages.free - reserved - needed
        return _Placement(shard, spare, global_pages, local_pages) if spare >= 0 else None

    def _find_prefix(self, request: Request, shard: int) -> tuple[list[int], list[list[int]]]:
        """Find the cached pages of a request's beginning: global ones, and those of the last chunk
        in each local group.

        At the start of a chunk the global pages suffice; within a chunk the local pages must be
        cached, too. The last token is never taken from the cache: its logits are needed.
        """
        limits, pages = self.limits, self.pages[shard]
        size, stripes = limits.geometry.global_page, range(limits.stripes)
        global_pages: list[int] = []
        local_pages = self._make_groups()
        if not self._enable_prefix_caching or request.params.prompt_logprobs is not None:
            return global_pages, local_pages
        for block in range((len(request.tokens) - 1) // size):
            page = pages.find_cached((GLOBAL_GROUP, request.hash_block(block, size), 0))
            if page is None:
                break
            global_pages.append(page)
        first = limits.geometry.find_chunk_block(len(global_pages) * size)
        for block in range(first, len(global_pages)):
            key = request.hash_block(block, size)
            cached = [
                [
                    page
                    for stripe in stripes
                    if (page := pages.find_cached((group, key, stripe))) is not None
                ]
                for group in range(limits.local_groups)
            ]
            if any(len(ids) < limits.stripes for ids in cached):
                break
            for group, ids in zip(local_pages, cached, strict=True):
                group += ids
        return global_pages[: first + len(local_pages[0]) // limits.stripes], local_pages

    def _propose_drafts(self) -> dict[Request, tuple[int, ...]]:
        """Draft tokens of decoding requests: within the chunk, the length and the step's tokens.

        Drafts never cross into another chunk: its local pages would replace pages that are still
        needed if the drafts are rejected.
        """
        if self._proposer is None:
            return {}
        limits = self.limits
        found: dict[Request, tuple[int, ...]] = {}
        budgets = [limits.tokens - limits.requests] * limits.shards
        for request in self.running:
            # Penalties and grammars change the logits of a token by the tokens just before it.
            depends_on_output = request.params.has_penalties or request.is_host_driven
            if request.is_prefilling or request.is_complete or depends_on_output:
                continue
            start = request.computed
            most = min(
                limits.drafts,
                limits.chunk - 1 - start % limits.chunk,
                request.max_length - start - 2,
                budgets[request.shard],
            )
            drafts = tuple(self._proposer(request, most)) if most > 0 else ()
            if drafts:
                found[request] = drafts
                budgets[request.shard] -= len(drafts)
        return found

    def _schedule_decode(
        self,
        request: Request,
        chunks: list[list[ScheduledChunk]],
        is_loop: bool,
        drafts: tuple[int, ...],
    ) -> None:
        """Schedule the row of a decoding request, if there are pages for it."""
        limits, start = self.limits, request.computed
        if request not in self.running:  # preempted for an older request
            return
        self._enter_chunk(request, start)
        tokens = 1 + len(drafts)
        if is_loop:
            left = limits.chunk - start % limits.chunk
            most = limits.loop_steps
            if self.waiting:
                most = -(-limits.loop_steps // _WAITING_DIVISOR)
            tokens = min(most, left, request.max_length - start - 1)
            if self._count_missing(request, start, start + tokens) > self.pages[request.shard].free:
                tokens = 1
        if self._allocate_or_preempt(request, start, start + tokens, chunks):
            chunk = ScheduledChunk(
                request,
                start,
                start + tokens,
                request.local_pages,
                max_sampled=tokens,
                drafts=drafts,
                is_first=request.is_fresh,
            )
            request.is_fresh = False
            chunks[request.shard].append(chunk)

    def _schedule_prefill(
        self,
        request: Request,
        chunks: list[list[ScheduledChunk]],
        completed: list[tuple[int, list[list[int]]]],
    ) -> None:
        """Schedule the next rows of a prompt, one per attention chunk, within the step's tokens,
        rows and pages.

        The first row continues in the local pages that the request owns. Each further row has local
        pages of its own, since all rows run in one step; the request keeps the last row's.
        """
        limits, scheduled = self.limits, chunks[request.shard]
        start, length = request.computed, len(request.tokens)
        is_first_row = True
        while start < length and request in self.running and len(scheduled) < limits.rows:
            budget = limits.tokens - sum(chunk.stop - chunk.start for chunk in scheduled)
            chunk_end = limits.geometry.find_chunk_start(start) + limits.chunk
            stop = min(length, start + budget, chunk_end)
            if stop == start:
                return
            if is_first_row:
                self._enter_chunk(request, start)
                if not self._allocate_or_preempt(request, start, stop, chunks):
                    return
            else:
                old, request.local_pages = request.local_pages, self._make_groups()
                completed.append((request.shard, old))
                # A further row does not preempt other requests: it can run in the next step.
                if not self._allocate(request, start, stop):
                    return
            scheduled.append(
                ScheduledChunk(
                    request,
                    start,
                    stop,
                    request.local_pages,
                    max_sampled=int(stop == length),
                    feature_slots=tuple(request.feature_slots),
                    is_first=request.is_fresh,
                )
            )
            request.is_fresh = is_first_row = False
            start = stop
            if start % limits.chunk:  # one row per chunk, even if a preemption freed tokens
                return

    def _enter_chunk(self, request: Request, start: int) -> None:
        """Release the previous chunk's local pages if `start` is the first position of a chunk."""
        if start % self.limits.chunk == 0:
            self._release_pages(request.shard, request.local_pages)
            request.local_pages = self._make_groups()

    def _allocate_or_preempt(
        self, request: Request, start: int, stop: int, chunks: list[list[ScheduledChunk]]
    ) -> bool:
        """Allocate the pages of positions start .. stop, preempting the youngest requests.

        Returns:
            False if the request itself was preempted.
        """
        while not self._allocate(request, start, stop):
            youngest = [other for other in self.running if other.shard == request.shard][-1]
            chunks[request.shard][:] = [
                chunk for chunk in chunks[request.shard] if chunk.request is not youngest
            ]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True

    def _allocate(self, request: Request, start: int, stop: int) -> bool:
        """Allocate the pages of positions start .. stop; False if too few are free."""
        pages = self.pages[request.shard]
        if self._count_missing(request, start, stop) > pages.free:
            return False
        missing_global, missing_local = self._count_missing_by_group(request, start, stop)
        request.global_pages += pages.allocate(missing_global)
        for group in request.local_pages:
            group += pages.allocate(missing_local)
        return True

    def _count_missing(self, request: Request, start: int, stop: int) -> int:
        missing_global, missing_local = self._count_missing_by_group(request, start, stop)
        return missing_global + self.limits.local_groups * missing_local

    def _count_missing_by_group(self, request: Request, start: int, stop: int) -> tuple[int, int]:
        return self.limits.geometry.count_missing(
            start,
            stop,
            owned_global=len(request.global_pages),
            owned_local=len(request.local_pages[0]),
        )

    def _cache_pages(self, chunk: ScheduledChunk) -> None:
        """Add the pages that a scheduled chunk fills to the prefix cache."""
        if not self._enable_prefix_caching:
            return
        request, size = chunk.request, self.limits.geometry.global_page
        stripes = self.limits.stripes
        pages, first = self.pages[request.shard], self.limits.geometry.find_chunk_block(chunk.start)
        blocks = min(chunk.stop, len(request.tokens)) // size
        for block in range(request.cached_blocks, blocks):
            key = request.hash_block(block, size)
            pages.cache(request.global_pages[block], (GLOBAL_GROUP, key, 0))
            if block >= first:  # the local pages of earlier chunks have been released
                for group, ids in enumerate(chunk.local_pages):
                    for stripe in range(stripes):
                        pages.cache(ids[(block - first) * stripes + stripe], (group, key, stripe))
        request.cached_blocks = max(request.cached_blocks, blocks)

    def _release(self, request: Request) -> None:
        """Remove a request from the running ones, and release what it owns."""
        self.running.remove(request)
        self.slots[request.shard].release([request.slot - request.shard * self.limits.requests])
        self._release_pages(request.shard, [request.global_pages, *request.local_pages])
        request.global_pages, request.local_pages = [], []
        self._release_features(request)

    def _release_features(self, request: Request) -> None:
        self.features.release(request.feature_slots)
        request.feature_slots = []

    def _release_pages(self, shard: int, groups: list[list[int]]) -> None:
        for ids in groups:
            self.pages[shard].release(ids)

    def _make_groups(self) -> list[list[int]]:
        return [[] for _ in range(self.limits.local_groups)]
