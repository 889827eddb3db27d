"""`POST /v1/chat/completions`."""

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response

from l4jax.engine.request import TokenLogprobs
from l4jax.server.deltas import IndexedDelta, iterate_deltas
from l4jax.server.errors import convert_value_error
from l4jax.server.handle import RequestHandle
from l4jax.server.logprobs import LogprobsFormatter
from l4jax.server.params import make_chat_params
from l4jax.server.protocol import (
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    FunctionCall,
    NamedChoice,
    TokenLogprob,
    ToolCall,
)
from l4jax.server.responses import respond
from l4jax.server.service import Service
from l4jax.server.usage import StreamUsage, UsageCounter
from l4jax.text.chat import Prompt
from l4jax.text.grammar import tool_schema
from l4jax.text.tokenizer import Tokenizer
from l4jax.text.tools import CallDelta, TextDelta, ToolCallParser


async def create_chat_completion(service: Service, body: ChatRequest) -> Response:
    """Answer a conversation, as a whole or as a stream.

    Raises:
        ApiError: for a request that cannot be answered.
    """
    model = service.get_model(body.model)
    params = make_chat_params(body, service.defaults, service.options, _make_tool_schema(body))
    handle = service.loop.reserve(body.n)
    try:
        prompt = await service.preprocessor.render(body, has_tools=_may_call_tools(body))
        requests = await service.preprocessor.make_requests([prompt], params)
        await handle.submit(requests, "messages")
        reply = ChatReply(body, model, prompt, handle, service.tokenizer)
        return await respond(reply, handle.close, is_stream=bool(body.stream))
    except BaseException:
        handle.close()
        raise


def _may_call_tools(body: ChatRequest) -> bool:
    return bool(body.tools) and body.tool_choice != "none"


def _make_tool_schema(body: ChatRequest) -> dict[str, Any] | None:
    """Make the JSON schema of the calls that `tool_choice` forces; None if it forces none."""
    choice = body.tool_choice
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if choice in (None, "none", "auto"):
        return None
    name = choice.function.name if isinstance(choice, NamedChoice) else None
    with convert_value_error("tools"):
        return tool_schema(tools, name, is_parallel=body.parallel_tool_calls is not False)


@dataclasses.dataclass
class _Choice:
    """A growing choice."""

    tools: ToolCallParser | None
    content: list[str] = dataclasses.field(default_factory=list)
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    stop_reason: int | str | None = None


@dataclasses.dataclass(frozen=True)
class _ChoiceDelta:
    """New content of a choice: text, numbered tool calls, log-probabilities."""

    content: str
    calls: list[tuple[int, ToolCall]]
    logprobs: ChatLogprobs | None


class ChatReply:
    """Formats the deltas of one chat request.

    Args:
        body: of the request.
        model: name in the response.
        prompt: the encoded conversation.
        handle: with the submitted requests, one per choice.
        tokenizer: the model's.
    """

    def __init__(
        self,
        body: ChatRequest,
        model: str,
        prompt: Prompt,
        handle: RequestHandle,
        tokenizer: Tokenizer,
    ):
        self._body, self._prompt = body, prompt
        self._handle, self._tokenizer = handle, tokenizer
        self._formatter = LogprobsFormatter(tokenizer, body.return_tokens_as_token_ids)
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.usage = UsageCounter(prompt_tokens=len(prompt.token_ids))
        names = [tool.function.name for tool in body.tools or ()]
        parses_tools = _may_call_tools(body)
        self._choices = [
            _Choice(ToolCallParser(names) if parses_tools else None) for _ in handle.requests
        ]

    async def collect(self) -> ChatResponse:
        """Return all choices after the last delta."""
        prompt_logprobs = None
        async for part in self._iterate():
            self._add(part)
            prompt_logprobs = part.prompt_logprobs or prompt_logprobs
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(
                    content="".join(choice.content) or (None if choice.calls else ""),
                    tool_calls=choice.calls,
                ),
                logprobs=ChatLogprobs(content=choice.logprobs) if self._body.logprobs else None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        return ChatResponse(
            **self._head,
            choices=choices,
            usage=self.usage.to_usage(),
            prompt_logprobs=self._format_prompt(prompt_logprobs),
        )

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield `chat.completion.chunk` objects."""
        stream_usage = StreamUsage.from_options(self._body.stream_options)
        base = self._head | {"object": "chat.completion.chunk"}
        for index in range(len(self._choices)):
            delta = {"role": "assistant", "content": ""}
            chunk = base | {"choices": [_format_choice(index, delta)]}
            yield stream_usage.add(chunk, self.usage)
        async for part in self._iterate():
            added, head = self._add(part), base
            if part.prompt_logprobs is not None:
                head = base | {"prompt_logprobs": self._format_prompt(part.prompt_logprobs)}
            for choice in self._format_choices(part.index, added):
                yield stream_usage.add(head | {"choices": [choice]}, self.usage)
                head = base
        if stream_usage.has_final:
            yield base | {"choices": [], "usage": self.usage.to_usage().model_dump()}

    def _iterate(self) -> AsyncIterator[IndexedDelta]:
        return iterate_deltas(self._handle, self._tokenizer, self.usage, self._body.n)

    def _add(self, part: IndexedDelta) -> _ChoiceDelta:
        """Append a delta to its choice, with tool calls parsed from the text."""
        choice, delta = self._choices[part.index], part.delta
        text, calls = delta.text, []
        if choice.tools is not None:
            events = choice.tools.push(delta.text)
            if delta.finish_reason is not None:
                events += choice.tools.finish()
            text = "".join(event.text for event in events if not isinstance(event, CallDelta))
            calls = self._add_calls(choice, events)
        logprobs = None
        if self._body.logprobs:
            logprobs = self._formatter.format_chat(delta.token_ids, delta.logprobs)
            choice.logprobs += logprobs.content
        choice.content.append(text)
        if delta.finish_reason is not None:
            has_called = choice.calls and delta.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if has_called else delta.finish_reason
            choice.stop_reason = delta.stop_reason
        return _ChoiceDelta(text, calls, logprobs)

    def _add_calls(
        self, choice: _Choice, events: list[TextDelta | CallDelta]
    ) -> list[tuple[int, ToolCall]]:
        """Append new calls; only the first one without `parallel_tool_calls`."""
        new = []
        for event in events:
            is_allowed = self._body.parallel_tool_calls is not False or not choice.calls
            if isinstance(event, CallDelta) and is_allowed:
                function = FunctionCall(name=event.call.name, arguments=event.call.arguments)
                call = ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=function)
                new.append((len(choice.calls), call))
                choice.calls.append(call)
        return new

    def _format_choices(self, index: int, added: _ChoiceDelta) -> list[dict[str, Any]]:
        """Format the choices of chunks for a delta: its text, each call, the end."""
        choice, formatted = self._choices[index], []
        if added.content or (added.logprobs and added.logprobs.content):
            formatted.append(_format_choice(index, {"content": added.content}, added.logprobs))
        for number, call in added.calls:
            delta = {"tool_calls": [{"index": number, **call.model_dump()}]}
            formatted.append(_format_choice(index, delta))
        if choice.finish_reason:
            end = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            formatted.append(_format_choice(index, {}) | end)
        return formatted

    def _format_prompt(
        self, found: list[TokenLogprobs | None] | None
    ) -> list[dict[str, Any] | None] | None:
        if found is None:
            return None
        return self._formatter.format_prompt(self._prompt.token_ids, found)


def _format_choice(
    index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": None if logprobs is None else logprobs.model_dump(),
        "finish_reason": None,
    }
