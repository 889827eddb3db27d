"""The application: which path is answered by what."""

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
from l4jax.server import errors
from l4jax.server.chat import answer_chat
from l4jax.server.completions import answer_completion
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
from l4jax.server.replies import run_while_connected
from l4jax.server.service import Service

STOP_SECONDS = 10.0  # for the engine's thread to end its step
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class _JsonRequest(Request):
    async def json(self) -> Any:
        return errors.parse_json(await self.body())


class _JsonRoute(APIRoute):
    """Reads bodies as JSON is written, without Python's NaN."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return read


def build_app(service: Service) -> ASGIApp:
    """The server as an ASGI application, which starts and stops the engine's thread."""

    @contextlib.asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await service.loop.stop(STOP_SECONDS)
        service.close()

    app = FastAPI(
        title="l4jax",
        summary="Llama 4 behind OpenAI's API",
        version=__version__,
        lifespan=live,
        root_path=service.options.root_path,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        strict_content_type=False,
    )
    app.router.route_class = _JsonRoute
    app.add_exception_handler(HTTPException, errors.answer_http_error)
    app.add_exception_handler(RequestValidationError, errors.answer_invalid)
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
    _add_answers(app, service)
    _add_tokens(app, service)
    _add_models(app, service)
    _add_state(app, service)
    _add_page(app)
    return AccessLog(app)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=STREAMS | REFUSALS, response_model=ChatResponse)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; `stream` sends `chat.completion.chunk` events."""
        return await run_while_connected(request.receive, answer_chat(service, body))

    @app.post("/v1/completions", responses=STREAMS | REFUSALS, response_model=CompletionResponse)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts; `stream` sends `text_completion` events."""
        return await run_while_connected(request.receive, answer_completion(service, body))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=REFUSALS)
    async def tokenize(body: TokenizePrompt | TokenizeChat) -> TokenizeResponse:
        """The token ids of a text or of a conversation."""
        service.find_model(body.model)
        with service.hold_place():
            if isinstance(body, TokenizePrompt):
                prompt = await service.spell(body.prompt, body.add_special_tokens)
            else:
                prompt = await service.render(body, bool(body.tools))
        tokens, spell = list(prompt.token_ids), service.tokenizer.token_bytes
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=service.max_model_len,
            tokens=tokens,
            token_strs=[spell(token).decode(errors="replace") for token in tokens]
            if body.return_token_strs
            else None,
        )

    @app.post("/detokenize", responses=REFUSALS)
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids, special tokens included."""
        service.find_model(body.model)
        decode = service.tokenizer.decode
        with service.hold_place():
            text = await service.read(
                lambda: decode(body.tokens, skip_special_tokens=False), "tokens"
            )
        return DetokenizeResponse(prompt=text)

    @app.get("/tokenizer_info", responses={401: REFUSALS[401]})
    async def tokenizer_info() -> TokenizerInfo:
        """What a client needs to render conversations itself, as lm-eval does."""
        names = service.tokenizer.special_tokens_map
        template = service.llm.inputs.chat_template or service.tokenizer.chat_template
        return TokenizerInfo(**names, chat_template=template)


def _add_models(app: FastAPI, service: Service) -> None:
    def describe(name: str) -> Model:
        return Model(
            id=name,
            created=service.created,
            root=service.options.served_model_names[0],
            max_model_len=service.max_model_len,
        )

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> ModelList:
        """The names that the model is served under."""
        return ModelList(data=[describe(name) for name in service.options.served_model_names])

    @app.get("/v1/models/{name:path}", responses={401: REFUSALS[401], 404: REFUSALS[404]})
    async def model(name: str) -> Model:
        """One of them."""
        return describe(service.find_model(name))


def _add_state(app: FastAPI, service: Service) -> None:
    loop = service.loop

    @app.get("/health", responses={503: REFUSALS[503]})
    async def health() -> dict[str, str]:
        """Whether the server lives: restart it if not."""
        if not loop.is_alive:
            raise ApiError(503, "The engine has stopped: restart the server.", code="dead")
        return {"status": "ok"}

    @app.get("/ready", responses={503: REFUSALS[503]})
    async def ready() -> dict[str, str]:
        """Whether requests should come here: compiled, and not about to stop."""
        if not loop.is_ready or loop.is_draining:
            why = "The server is shutting down." if loop.is_draining else "Still compiling."
            raise ApiError(503, why, code="not_ready", headers={"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of l4jax."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.spell(), media_type=PROMETHEUS)


def _add_page(app: FastAPI) -> None:
    text = importlib.resources.files("l4jax.server").joinpath("page/index.html").read_text("utf-8")
    headers = {"Content-Security-Policy": spell_policy(text), "X-Content-Type-Options": "nosniff"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        """A page to chat on."""
        return HTMLResponse(text, headers=headers)


def spell_policy(page: str) -> str:
    """A content security policy for a page: it runs what is in it, and reaches this server only."""

    def hash_all(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hash_all('script')}; style-src {hash_all('style')}; "
        "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
