"""The engine's thread: requests go in from the event loop, and tokens come back to it.

The engine is called from this one thread only. Orders go in through a queue, in order; what a step
brought goes back in one call of the event loop a step, however many requests it was for. What is
in flight is counted on the event loop, so the bound on it is exact.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from l4jax.engine.engine import Engine, RequestUpdate
from l4jax.engine.request import Constraints, SamplingParams
from l4jax.server.metrics import Metrics
from l4jax.text.image import Tiles

logger = logging.getLogger(__name__)


class BusyError(Exception):
    """As many requests are in flight as may be."""


class ClosedError(Exception):
    """The engine's thread takes no more requests: it was stopped, or failed."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One engine request."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    images: tuple[Tiles, ...] = ()
    constraints: Constraints | None = None


@dataclasses.dataclass
class _Progress:
    """Times of one engine request, in seconds of `time.monotonic`."""

    work: Work
    started: float
    last: float
    tokens: int = 0
    has_ended: bool = False  # in the engine

    def finish(self, metrics: Metrics, reason: str) -> None:
        seconds = time.monotonic() - self.started
        metrics.finish(reason, seconds, len(self.work.token_ids), self.tokens)


class RequestHandle:
    """A caller's place: up to `count` engine requests, whose updates come in one queue.

    It lives on the event loop. Whoever reserved it closes it, at any moment and as often as it
    likes: what still runs is cancelled, and the place is free.
    """

    def __init__(self, loop: "EngineLoop", count: int):
        self.count = count
        self._loop = loop
        self._updates: asyncio.Queue[tuple[int, RequestUpdate]] = asyncio.Queue()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running: dict[int, _Progress] = {}
        self._is_closed = False
        self.ids: list[int] = []  # of the engine; used on the engine's thread only

    async def start(self, works: list[Work], timeout: float | None = None) -> None:
        """Hand the requests to the engine: all of them or, where it refuses one, none.

        Raises:
            PromptError, ValueError: what the engine says of a request that it cannot run.
            ClosedError: the engine's thread has ended.
        """
        assert len(works) <= self.count and not self._running
        now = time.monotonic()
        self._running = {i: _Progress(work, now, now) for i, work in enumerate(works)}
        self._loop.order(lambda: self._loop.admit(self, works, timeout))
        await self._accepted

    async def receive(self) -> tuple[int, RequestUpdate]:
        """The next update and the place in `works` of the request that it is for."""
        return await self._updates.get()

    def end(self, index: int, reason: str) -> None:
        """Note that one of the answers has ended, perhaps before the engine saw that."""
        progress = self._running.pop(index, None)
        if progress is not None:
            progress.finish(self._loop.metrics, reason)
            if not progress.has_ended:
                self._loop.order(lambda: self._loop.cancel(self.ids[index : index + 1]))

    def close(self) -> None:
        """Give the place back, and cancel what still runs."""
        if self._is_closed:
            return
        self._is_closed = True
        for progress in self._running.values():
            progress.finish(self._loop.metrics, "abort")
        if self._running:
            self._loop.order(lambda: self._loop.cancel(self.ids))
        self._running = {}
        self._loop.leave(self)

    def accept(self, error: Exception | None) -> None:
        """The engine's answer to `start`."""
        if self._accepted.done():
            return
        if error is None:
            self._accepted.set_result(None)
        else:
            self._running = {}
            self._accepted.set_exception(error)
            self._accepted.exception()  # seen, even if the caller went away meanwhile

    def take(self, index: int, update: RequestUpdate) -> None:
        """What a step brought for one of the requests."""
        progress = self._running.get(index)
        if progress is None:
            return
        now, metrics = time.monotonic(), self._loop.metrics
        tokens = len(update.token_ids)
        if tokens and not progress.tokens:
            metrics.first_token.observe(now - progress.started)
            metrics.observe_next((now - progress.last) / tokens, tokens - 1)
        elif tokens:
            metrics.observe_next((now - progress.last) / tokens, tokens)
        progress.tokens += tokens
        progress.last = now
        progress.has_ended = update.finish_reason is not None
        self._updates.put_nowait((index, update))

    def abort(self) -> None:
        """End all of its requests as a deadline would."""
        for index, progress in self._running.items():
            if not progress.has_ended:
                self.take(index, RequestUpdate(-1, [], [], "abort"))
        self._loop.order(lambda: self._loop.cancel(self.ids))
        self.accept(ClosedError("The server is shutting down: ask another one, or later."))


class EngineLoop:
    """Runs an engine on a thread of its own.

    Args:
        engine: nobody else may call it from now on.
        capacity: engine requests that may be in flight, running and waiting together.
        metrics: what is observed goes there.
    """

    def __init__(self, engine: Engine, capacity: int, metrics: Metrics):
        self.capacity, self.metrics = capacity, metrics
        self.stats = engine.stats()
        self.is_ready = False
        self.is_alive = False
        self.is_draining = False
        self._engine = engine
        self._tickets: set[RequestHandle] = set()
        self._owners: dict[int, tuple[RequestHandle, int]] = {}
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._home: asyncio.AbstractEventLoop | None = None

    @property
    def is_running(self) -> bool:
        """Whether the thread has not ended yet."""
        return self._thread.is_alive()

    @property
    def is_compiling(self) -> bool:
        """Whether something is compiled beside the thread."""
        return self._engine.is_compiling

    # On the event loop.

    def start(self) -> None:
        """Start the thread, which first compiles what the engine needs. Call on the event loop."""
        self._home = asyncio.get_running_loop()
        self.is_alive = True
        self._thread.start()

    def reserve(self, count: int) -> RequestHandle:
        """A place for so many engine requests.

        Raises:
            BusyError: there is none.
            ClosedError: the engine's thread has ended or is about to.
        """
        if self.is_draining or not self.is_alive:
            raise ClosedError("The server is shutting down: ask another one, or later.")
        if self.count_flying() + count > self.capacity:
            raise BusyError
        ticket = RequestHandle(self, count)
        self._tickets.add(ticket)
        return ticket

    def count_flying(self) -> int:
        """Engine requests that have a place."""
        return sum(ticket.count for ticket in self._tickets)

    def leave(self, ticket: RequestHandle) -> None:
        """Free a ticket's place."""
        self._tickets.discard(ticket)

    def drain(self) -> None:
        """Take no more requests."""
        self.is_draining = True

    def abort_all(self) -> None:
        """End every request in flight: their callers are told."""
        for ticket in list(self._tickets):
            ticket.abort()

    async def stop(self, timeout: float) -> None:
        """End the thread after its current step, waiting so many seconds for that."""
        self.drain()
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join, timeout)

    def order(self, call: Callable[[], None]) -> None:
        """Have something done on the engine's thread, after all earlier orders."""
        self._orders.put(call)

    # On the engine's thread.

    def admit(self, ticket: RequestHandle, works: list[Work], timeout: float | None) -> None:
        """Add requests to the engine, all or none."""
        try:
            for index, work in enumerate(works):
                request_id = self._engine.add(
                    work.token_ids,
                    work.params,
                    work.images,
                    constraints=work.constraints,
                    timeout=timeout,
                )
                ticket.ids.append(request_id)
                self._owners[request_id] = ticket, index
        except Exception as error:
            self.cancel(ticket.ids)
            self._send(ticket.accept, error)
        else:
            self._send(ticket.accept, None)

    def cancel(self, request_ids: list[int]) -> None:
        """Cancel requests of the engine; those that have ended are left alone."""
        for request_id in request_ids:
            if self._owners.pop(request_id, None) is not None:
                self._engine.cancel(request_id)

    def _run(self) -> None:
        try:
            began = time.monotonic()
            self._engine.warm_up()
            self.is_ready = True
            logger.info("ready", extra={"seconds": round(time.monotonic() - began, 1)})
            while self._obey():
                if self._engine.has_work:
                    self._step()
                self.stats = self._engine.stats()
        except Exception:
            logger.exception("the engine's thread failed")
        finally:
            self.is_alive = self.is_ready = False
            self._send(self.abort_all)

    def _obey(self) -> bool:
        """Carry out the orders that are there, waiting for one if there is nothing else to do."""
        try:
            order = self._orders.get(block=not self._engine.has_work)
            while order is not None:
                order()
                order = self._orders.get_nowait()
        except queue.Empty:
            return True
        return False

    def _step(self) -> None:
        try:
            updates = self._engine.step()
        except Exception:
            # The engine fails the requests of a broken step itself. What still gets here has
            # broken its bookkeeping: every request is ended, and the next ones get a try.
            logger.exception("a step failed outside of the engine's own care")
            updates = [RequestUpdate(request_id, [], [], "error") for request_id in self._owners]
            for request_id in self._owners:
                self._engine.cancel(request_id)
        mail = [(*self._owners[u.request_id], u) for u in updates if u.request_id in self._owners]
        for update in updates:
            if update.finish_reason is not None:
                self._owners.pop(update.request_id, None)
        if mail:
            self._send(_deliver, mail)

    def _send(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._home is not None
        try:
            self._home.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the event loop is closed: nobody is left to be told
            logger.debug("the event loop is closed")


def _deliver(mail: list[tuple[RequestHandle, int, RequestUpdate]]) -> None:
    for ticket, index, update in mail:
        ticket.take(index, update)
