"""Answers on the wire: whole, or as server-sent events; and callers who hang up."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from l4jax.server.errors import CLIENT_GONE, ApiError, make_body
from l4jax.server.logs import note, spell_trace
from l4jax.server.protocol import StreamOptions
from l4jax.server.usage import UsageCounter

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Reply(Response):
    """A whole answer."""

    media_type = "application/json"

    def __init__(self, content: BaseModel, tally: UsageCounter):
        super().__init__(content.model_dump_json())
        self._tally = tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note(scope, **dataclasses.asdict(self._tally))
        await super().__call__(scope, receive, send)


class EventStream(Response):
    """An answer in server-sent events, up to `[DONE]`.

    An error on the way comes as an event, since the status has been sent. Whatever ends the stream,
    the caller hanging up included, `close` is called.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        tally: UsageCounter,
        close: Callable[[], None],
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._tally, self._close = events, tally, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._write(scope, send))
        except ApiError as error:
            if error.status_code != CLIENT_GONE:
                raise
            note(scope, status=CLIENT_GONE)
        finally:
            self._close()
            note(scope, **dataclasses.asdict(self._tally))

    async def _write(self, scope: Scope, send: Send) -> None:
        async def put(data: str, is_last: bool = False) -> None:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})

        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async for event in self._events:
                await put(spell_json(event))
        except ApiError as error:
            note(scope, status=error.status_code)
            await put(spell_json(error.body))
        except Exception as error:
            note(scope, status=500)
            logger.error("a stream failed", extra={"trace": spell_trace(error)})
            await put(spell_json(make_body(500, "The server failed on this request.")))
        finally:
            await self._events.aclose()
        await put("[DONE]", is_last=True)


class Answers(Protocol):
    """The answers to one request, on their way."""

    tally: UsageCounter

    def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """Their pieces, as events."""
        ...

    async def collect(self) -> BaseModel:
        """All of them, once they have ended."""
        ...


async def hand_over(work: Answers, close: Callable[[], None], *, is_stream: bool) -> Response:
    """What a request is answered with, piece by piece or all at once. `close` is called when the
    answers have ended; where collecting them fails, that is left to the caller.
    """
    if is_stream:
        return EventStream(work.stream(), work.tally, close)
    response = await work.collect()
    close()
    return Reply(response, work.tally)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller hangs up.

    Raises:
        ApiError: of status 499, when it did. Nobody reads it.
    """

    async def wait_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(wait_gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_GONE, "The client hung up.")
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


@dataclasses.dataclass(frozen=True)
class UsageNotes:
    """Where a stream reports its usage: in each chunk, in a last one, or nowhere."""

    in_each: bool
    has_last: bool

    def add(self, chunk: dict[str, Any], tally: UsageCounter) -> dict[str, Any]:
        """A chunk with the usage so far; null says that it comes at the end."""
        if self.in_each:
            return chunk | {"usage": tally.spell().model_dump()}
        return chunk | {"usage": None} if self.has_last else chunk


def note_usage(options: StreamOptions | None) -> UsageNotes:
    """What `stream_options` ask for."""
    wanted = options or StreamOptions()
    return UsageNotes(wanted.include_usage and wanted.continuous_usage_stats, wanted.include_usage)


def spell_json(value: Any) -> str:
    """JSON in one line and in ASCII: half a surrogate pair in it is then still JSON."""
    return json.dumps(value, separators=(",", ":"))
