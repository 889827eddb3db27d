"""Middleware of all requests: the access log, API keys, and the limit of the body. Plain ASGI."""

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l4jax.server.errors import CLIENT_GONE, ApiError, make_body, make_shutdown_error
from l4jax.server.logs import add_log_fields, format_trace, get_log_fields
from l4jax.server.options import Options

BODY_SECONDS = 60.0  # for a body to arrive; a response has no limit
LOGGED_BYTES = 16_384  # of a body, if bodies are logged
# Without a key: probes, Prometheus, and the page, which has a field for the key.
OPEN = ("/", "/health", "/ready", "/metrics", "/version", "/openapi.json")

logger = logging.getLogger(__name__)


class AccessLog:
    """Logs one line per request, gives it an id, and handles uncaught exceptions."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id = time.monotonic(), uuid.uuid4().hex
        fields = get_log_fields(scope)
        has_started = False

        async def watch(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                fields.setdefault("status", message["status"])
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            logger.error("a request failed", extra={"id": request_id, "trace": format_trace(error)})
            if not has_started:
                body = make_body(500, f"The server failed on this request, {request_id}.")
                await JSONResponse(body, 500)(scope, receive, watch)
        finally:
            level = logging.DEBUG if scope["path"] in ("/health", "/ready") else logging.INFO
            logger.log(
                level,
                "request",
                extra={
                    "id": request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "seconds": round(time.monotonic() - started, 4),
                    **fields,
                },
            )


class AdmissionMiddleware:
    """Admits requests with a valid key and a body within the limit, until the server drains.

    Args:
        app: the next application.
        options: the keys and the limit.
        is_draining: is the server about to stop?
    """

    def __init__(self, app: ASGIApp, options: Options, is_draining: Callable[[], bool]):
        self._app, self._options, self._is_draining = app, options, is_draining
        self._digests = [_digest(key) for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._read_body(scope, receive)
        except ApiError as error:
            if error.status_code == CLIENT_GONE:
                add_log_fields(scope, status=CLIENT_GONE)
                return
            await JSONResponse(error.body, error.status_code, error.headers)(scope, receive, send)
            return
        if body is None:
            await self._app(scope, receive, send)
            return
        if self._options.logs_requests:
            text = body[:LOGGED_BYTES].decode(errors="replace")
            logger.info("request body", extra={"path": scope["path"], "body": text})
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._digests or path in OPEN:
            return
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # Constant time: digests of all keys are compared, so that timing does not even show the
        # length of a key.
        matches = [hmac.compare_digest(digest, right) for right in self._digests]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "No valid API key: send the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the body of a POST; None for other methods."""
        if scope["method"] != "POST":
            return None
        if self._is_draining():
            raise make_shutdown_error()
        limit = self._options.max_request_bytes
        too_large = ApiError(
            413, f"The body has more than {limit} bytes (--max-request-bytes): send less."
        )
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_GONE, "The client disconnected.")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, f"The body did not arrive within {BODY_SECONDS:g} seconds: send it again."
            ) from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
