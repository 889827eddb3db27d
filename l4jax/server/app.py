"""The FastAPI application: its routes."""

import base64
import contextlib
import hashlib
import importlib.resources
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from l4jax import __version__
from l4jax.server import errors, tokenization
from l4jax.server.chat import create_chat_completion
from l4jax.server.completions import create_completion
from l4jax.server.errors import ApiError
from l4jax.server.middleware import AccessLog, AdmissionMiddleware
from l4jax.server.protocol import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorBody,
    Model,
    ModelList,
    TokenizeChat,
    TokenizePrompt,
    TokenizeResponse,
    TokenizerInfo,
)
from l4jax.server.responses import run_while_connected
from l4jax.server.service import Service

STOP_SECONDS = 10.0  # for the last step of the engine's thread
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class _JsonRequest(Request):
    async def json(self) -> Any:
        return errors.parse_json(await self.body())


class _JsonRoute(APIRoute):
    """Parses bodies as strict JSON, without Python's NaN."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return read


def build_app(service: Service) -> ASGIApp:
    """Build the ASGI application, whose lifespan starts and stops the engine's thread."""

    @contextlib.asynccontextmanager
    async def run_engine(_: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await service.loop.stop(STOP_SECONDS)
        service.close()

    app = FastAPI(
        title="l4jax",
        summary="Llama 4 with OpenAI's API",
        version=__version__,
        lifespan=run_engine,
        root_path=service.options.root_path,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        strict_content_type=False,
    )
    app.router.route_class = _JsonRoute
    app.add_exception_handler(HTTPException, errors.handle_http_error)
    app.add_exception_handler(RequestValidationError, errors.handle_validation_error)
    app.add_middleware(
        AdmissionMiddleware, options=service.options, is_draining=lambda: service.loop.is_draining
    )
    if service.options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    _add_completions(app, service)
    _add_tokenization(app, service)
    _add_models(app, service)
    _add_state(app, service)
    _add_page(app)
    return AccessLog(app)


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=STREAMS | ERRORS, response_model=ChatResponse)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; `stream` sends `chat.completion.chunk` events."""
        return await run_while_connected(request.receive, create_chat_completion(service, body))

    @app.post("/v1/completions", responses=STREAMS | ERRORS, response_model=CompletionResponse)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts; `stream` sends `text_completion` events."""
        return await run_while_connected(request.receive, create_completion(service, body))


def _add_tokenization(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizePrompt | TokenizeChat) -> TokenizeResponse:
        """Return the token ids of a text or of a conversation."""
        return await tokenization.tokenize(service, body)

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """Return the text of token ids, including special tokens."""
        return await tokenization.detokenize(service, body)

    @app.get("/tokenizer_info", responses={401: ERRORS[401]})
    async def tokenizer_info() -> TokenizerInfo:
        """Return special tokens and template, for clients that render conversations themselves."""
        return tokenization.describe_tokenizer(service)


def _add_models(app: FastAPI, service: Service) -> None:
    def describe(name: str) -> Model:
        return Model(
            id=name,
            created=service.created,
            root=service.options.served_model_names[0],
            max_model_len=service.max_model_len,
        )

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> ModelList:
        """List the names that the model is served under."""
        return ModelList(data=[describe(name) for name in service.options.served_model_names])

    @app.get("/v1/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(name: str) -> Model:
        """Describe the model of a served name."""
        return describe(service.get_model(name))


def _add_state(app: FastAPI, service: Service) -> None:
    loop = service.loop

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """Return 200 while the engine is alive; otherwise restart the server."""
        if not loop.is_alive:
            raise ApiError(503, "The engine has stopped: restart the server.", code="dead")
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Return 200 between the warm-up and the shutdown."""
        if not loop.is_ready or loop.is_draining:
            reason = "The server is shutting down." if loop.is_draining else "Still compiling."
            raise ApiError(503, reason, code="not_ready", headers={"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of l4jax."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=PROMETHEUS)


def _add_page(app: FastAPI) -> None:
    text = importlib.resources.files("l4jax.server").joinpath("page/index.html").read_text("utf-8")
    headers = {"Content-Security-Policy": format_policy(text), "X-Content-Type-Options": "nosniff"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        """Return the chat page."""
        return HTMLResponse(text, headers=headers)


def format_policy(page: str) -> str:
    """Format a content security policy: inline scripts and styles by hash, and only this server."""

    def hash_all(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hash_all('script')}; style-src {hash_all('style')}; "
        "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
