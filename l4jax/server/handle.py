"""Engine requests of one HTTP request: submitted together, with their updates in one queue."""

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

from l4jax.engine.engine import RequestUpdate
from l4jax.engine.request import Constraints, SamplingParams
from l4jax.server.errors import ApiError, convert_value_error, make_shutdown_error
from l4jax.server.metrics import Metrics
from l4jax.text.image import Tiles

if TYPE_CHECKING:
    from l4jax.server.loop import EngineLoop


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """Arguments of `Engine.add` for one completion."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    images: tuple[Tiles, ...] = ()
    constraints: Constraints | None = None


@dataclasses.dataclass
class _Progress:
    """Times of one engine request, in seconds of `time.monotonic`."""

    request: EngineRequest
    started: float
    last: float
    tokens: int = 0
    has_ended: bool = False  # in the engine

    def observe(self, metrics: Metrics, reason: str) -> None:
        seconds = time.monotonic() - self.started
        metrics.observe_request(reason, seconds, len(self.request.token_ids), self.tokens)


class RequestHandle:
    """A reservation for `count` engine requests, and the queue of their updates.

    It lives on the event loop. Its owner closes it, at any moment and any number of times: running
    requests are aborted, and the reservation is released.
    """

    def __init__(self, loop: "EngineLoop", count: int, timeout: float | None):
        self.count = count
        self.requests: list[EngineRequest] = []
        self.ids: list[int] = []  # the engine's; used on the engine's thread only
        self._loop, self._timeout = loop, timeout
        self._updates: asyncio.Queue[tuple[int, RequestUpdate]] = asyncio.Queue()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running: dict[int, _Progress] = {}
        self._is_closed = False

    async def submit(self, requests: list[EngineRequest], param: str) -> None:
        """Submit requests to the engine: all of them or, if it refuses one, none.

        Args:
            requests: at most `count`.
            param: the field at fault if the engine refuses a prompt.

        Raises:
            ApiError: 400 for a request that the engine refuses, 503 if its thread has ended.
        """
        assert len(requests) <= self.count and not self.requests
        now = time.monotonic()
        self.requests = requests
        self._running = {i: _Progress(request, now, now) for i, request in enumerate(requests)}
        self._loop.post(lambda: self._loop.add_requests(self, requests, self._timeout))
        with convert_value_error(param):
            await self._accepted

    async def receive(self) -> tuple[int, RequestUpdate]:
        """Wait for the next update; return the index of its request, and the update.

        Raises:
            ApiError: 500 for a failed step, 504 after the timeout, 503 at a shutdown.
        """
        while True:
            index, update = await self._updates.get()
            if index not in self._running:  # ended by a stop string
                continue
            if update.finish_reason in ("error", "abort"):
                self.end(index, update.finish_reason)
                raise self._make_failure(update.finish_reason)
            return index, update

    def end(self, index: int, reason: str) -> None:
        """Record the end of a completion, and abort its request if the engine still runs it."""
        progress = self._running.pop(index, None)
        if progress is not None:
            progress.observe(self._loop.metrics, reason)
            if not progress.has_ended:
                self._loop.post(lambda: self._loop.cancel(self.ids[index : index + 1]))

    def close(self) -> None:
        """Release the reservation, and abort running requests."""
        if self._is_closed:
            return
        self._is_closed = True
        for progress in self._running.values():
            progress.observe(self._loop.metrics, "abort")
        if self._running:
            self._loop.post(lambda: self._loop.cancel(self.ids))
        self._running = {}
        self._loop.release(self)

    def accept(self, error: Exception | None) -> None:
        """Complete `submit`, with the engine's error if it has one."""
        if self._accepted.done():
            return
        if error is None:
            self._accepted.set_result(None)
        else:
            self._running = {}
            self._accepted.set_exception(error)
            self._accepted.exception()  # retrieved, even if the client has disconnected meanwhile

    def put(self, index: int, update: RequestUpdate) -> None:
        """Append an update of a request to the queue."""
        progress = self._running.get(index)
        if progress is None:
            return
        now, metrics = time.monotonic(), self._loop.metrics
        tokens = len(update.token_ids)
        if tokens and not progress.tokens:
            metrics.first_token.observe(now - progress.started)
            metrics.observe_inter_token((now - progress.last) / tokens, tokens - 1)
        elif tokens:
            metrics.observe_inter_token((now - progress.last) / tokens, tokens)
        progress.tokens += tokens
        progress.last = now
        progress.has_ended = update.finish_reason is not None
        self._updates.put_nowait((index, update))

    def abort(self) -> None:
        """End all requests as a deadline would."""
        for index, progress in self._running.items():
            if not progress.has_ended:
                self.put(index, RequestUpdate(-1, [], [], "abort"))
        self._loop.post(lambda: self._loop.cancel(self.ids))
        self.accept(make_shutdown_error())

    def _make_failure(self, reason: str) -> ApiError:
        if reason == "error":
            return ApiError(500, "The model failed on this request: ask again.", code="engine")
        if self._loop.is_draining or not self._loop.is_alive:
            return make_shutdown_error()
        return ApiError(
            504,
            f"The answer took longer than {self._timeout:g} s (--request-timeout): "
            "ask for fewer tokens.",
            code="timeout",
        )
