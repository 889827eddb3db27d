"""HTTP responses: JSON or server-sent events, until the client disconnects."""

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
from l4jax.server.logs import add_log_fields, format_trace
from l4jax.server.usage import UsageCounter

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ReplyBuilder(Protocol):
    """Formats the deltas of one HTTP request, once: by `stream` or by `collect`."""

    usage: UsageCounter

    def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the deltas as events."""
        ...

    async def collect(self) -> BaseModel:
        """Return the whole response after the last delta."""
        ...


async def respond(reply: ReplyBuilder, close: Callable[[], None], *, is_stream: bool) -> Response:
    """Make the response: a stream, or the whole reply after its end.

    `close` is called after the last delta. If collecting fails, the caller closes.
    """
    if is_stream:
        return EventStream(reply.stream(), reply.usage, close)
    content = await reply.collect()
    close()
    return JsonReply(content, reply.usage)


class JsonReply(Response):
    """A whole reply."""

    media_type = "application/json"

    def __init__(self, content: BaseModel, usage: UsageCounter):
        super().__init__(content.model_dump_json())
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        add_log_fields(scope, **dataclasses.asdict(self._usage))
        await super().__call__(scope, receive, send)


class EventStream(Response):
    """A reply in server-sent events, up to `[DONE]`.

    After the first event the status is sent, so a later error is an event, too. `close` is called
    at every end of the stream, including a disconnect of the client.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        usage: UsageCounter,
        close: Callable[[], None],
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._usage, self._close = events, usage, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._write(scope, send))
        except ApiError as error:
            if error.status_code != CLIENT_GONE:
                raise
            add_log_fields(scope, status=CLIENT_GONE)
        finally:
            self._close()
            add_log_fields(scope, **dataclasses.asdict(self._usage))

    async def _write(self, scope: Scope, send: Send) -> None:
        async def put(data: str, is_last: bool = False) -> None:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})

        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async for event in self._events:
                await put(format_json(event))
        except ApiError as error:
            add_log_fields(scope, status=error.status_code)
            await put(format_json(error.body))
        except Exception as error:
            add_log_fields(scope, status=500)
            logger.error("a stream failed", extra={"trace": format_trace(error)})
            await put(format_json(make_body(500, "The server failed on this request.")))
        finally:
            await self._events.aclose()
        await put("[DONE]", is_last=True)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it when the client disconnects.

    Raises:
        ApiError: of status 499 after a disconnect; no client reads it.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_GONE, "The client disconnected.")
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def format_json(value: Any) -> str:
    """Format JSON in one line of ASCII, in which half a surrogate pair is valid, too."""
    return json.dumps(value, separators=(",", ":"))
