"""The engine's thread: requests arrive from the event loop, and updates return to it.

Only this thread calls the engine. Commands arrive in a queue, in order. All updates of a step
return in one callback of the event loop, however many requests they are for. The event loop counts
the requests in flight, so their limit is exact.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from l4jax.engine.engine import Engine, RequestUpdate
from l4jax.server.errors import ApiError, make_shutdown_error
from l4jax.server.handle import EngineRequest, RequestHandle
from l4jax.server.metrics import Metrics

RETRY_SECONDS = 1  # for clients of a full server

logger = logging.getLogger(__name__)


class EngineLoop:
    """Runs an engine on a thread of its own.

    Args:
        engine: from now on only this thread calls it.
        capacity: engine requests that may be in flight, running and waiting together.
        metrics: receives the observations.
        request_timeout: seconds of a request; None is no limit.
    """

    def __init__(
        self, engine: Engine, capacity: int, metrics: Metrics, request_timeout: float | None = None
    ):
        self.capacity, self.metrics = capacity, metrics
        self.stats = engine.stats()
        self.is_ready = False
        self.is_alive = False
        self.is_draining = False
        self._engine, self._timeout = engine, request_timeout
        self._handles: set[RequestHandle] = set()
        self._owners: dict[int, tuple[RequestHandle, int]] = {}  # by the engine's request id
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._event_loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_running(self) -> bool:
        """Is the thread still running?"""
        return self._thread.is_alive()

    @property
    def is_compiling(self) -> bool:
        """Are programs still compiled in the background?"""
        return self._engine.is_compiling

    # On the event loop.

    def start(self) -> None:
        """Start the thread, which first compiles the engine's programs."""
        self._event_loop = asyncio.get_running_loop()
        self.is_alive = True
        self._thread.start()

    def reserve(self, count: int) -> RequestHandle:
        """Reserve room for engine requests.

        Raises:
            ApiError: 400 if so many never fit, 429 if they do not fit now, 503 at a shutdown.
        """
        if count > self.capacity:
            raise ApiError(
                400,
                f"n is {count} over all prompts: at most {self.capacity} answers fit.",
                param="n",
            )
        if self.is_draining or not self.is_alive:
            raise make_shutdown_error()
        if self.count_in_flight() + count > self.capacity:
            raise ApiError(
                429,
                f"{self.capacity} requests are in flight, which is the limit "
                f"(--max-num-seqs and --max-waiting): ask again in {RETRY_SECONDS} s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        handle = RequestHandle(self, count, self._timeout)
        self._handles.add(handle)
        return handle

    def count_in_flight(self) -> int:
        """Count the engine requests with a reservation."""
        return sum(handle.count for handle in self._handles)

    def release(self, handle: RequestHandle) -> None:
        """Release the reservation of a handle."""
        self._handles.discard(handle)

    def drain(self) -> None:
        """Accept no more requests."""
        self.is_draining = True

    def abort_all(self) -> None:
        """Abort all requests in flight; each client gets an error."""
        for handle in list(self._handles):
            handle.abort()

    async def stop(self, timeout: float) -> None:
        """End the thread after its current step; wait up to `timeout` seconds for it."""
        self.drain()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)

    def post(self, command: Callable[[], None]) -> None:
        """Queue a command for the engine's thread, after all earlier ones."""
        self._commands.put(command)

    # On the engine's thread.

    def add_requests(
        self, handle: RequestHandle, requests: list[EngineRequest], timeout: float | None
    ) -> None:
        """Add requests to the engine, all or none."""
        try:
            for index, request in enumerate(requests):
                request_id = self._engine.add(
                    request.token_ids,
                    request.params,
                    request.images,
                    constraints=request.constraints,
                    timeout=timeout,
                )
                handle.ids.append(request_id)
                self._owners[request_id] = handle, index
        except Exception as error:
            self.cancel(handle.ids)
            self._call_event_loop(handle.accept, error)
        else:
            self._call_event_loop(handle.accept, None)

    def cancel(self, request_ids: list[int]) -> None:
        """Cancel requests of the engine; ended ones are ignored."""
        for request_id in request_ids:
            if self._owners.pop(request_id, None) is not None:
                self._engine.cancel(request_id)

    def _run(self) -> None:
        try:
            started = time.monotonic()
            self._engine.warm_up()
            self.is_ready = True
            logger.info("ready", extra={"seconds": round(time.monotonic() - started, 1)})
            while self._run_commands():
                if self._engine.has_work:
                    self._step()
                self.stats = self._engine.stats()
        except Exception:
            logger.exception("the engine's thread failed")
        finally:
            self.is_alive = self.is_ready = False
            self._call_event_loop(self.abort_all)

    def _run_commands(self) -> bool:
        """Run the queued commands; wait for one if the engine has no work. False: stop."""
        try:
            command = self._commands.get(block=not self._engine.has_work)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _step(self) -> None:
        try:
            updates = self._engine.step()
        except Exception:
            # The engine fails the requests of a broken step itself. An exception that reaches this
            # line has broken its bookkeeping: all requests end, and new ones may still work.
            logger.exception("a step failed outside the engine's error handling")
            updates = [RequestUpdate(request_id, [], [], "error") for request_id in self._owners]
            for request_id in self._owners:
                self._engine.cancel(request_id)
        owned = [(*self._owners[u.request_id], u) for u in updates if u.request_id in self._owners]
        for update in updates:
            if update.finish_reason is not None:
                self._owners.pop(update.request_id, None)
        if owned:
            self._call_event_loop(_deliver, owned)

    def _call_event_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._event_loop is not None
        try:
            self._event_loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # closed: all clients are gone
            logger.debug("the event loop is closed")


def _deliver(owned: list[tuple[RequestHandle, int, RequestUpdate]]) -> None:
    for handle, index, update in owned:
        handle.put(index, update)
