"""`POST /v1/chat/completions`: a conversation in, an answer or its pieces out."""

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response

from l4jax.outputs import CompletionBuilder
from l4jax.server.errors import refuse_in_words
from l4jax.server.logprobs import Speller
from l4jax.server.loop import RequestHandle
from l4jax.server.params import read_chat_params
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
from l4jax.server.replies import hand_over, note_usage
from l4jax.server.service import Part, Service, make_id
from l4jax.server.usage import UsageCounter
from l4jax.text.chat import Prompt
from l4jax.text.grammar import tool_schema
from l4jax.text.tools import CallDelta, ToolCallParser


async def answer_chat(service: Service, request: ChatRequest) -> Response:
    """Answer a conversation, at once or as a stream.

    Raises:
        ApiError: for what cannot be answered.
    """
    model = service.find_model(request.model)
    has_tools = bool(request.tools) and request.tool_choice != "none"
    params = read_chat_params(request, service.defaults, service.options, _find_forced(request))
    ticket = service.reserve(request.n)
    try:
        prompt = await service.render(request, has_tools)
        answers = await service.start(ticket, [prompt], params, "messages")
        work = _Chat(service, request, model, prompt, ticket, answers)
        return await hand_over(work, ticket.close, is_stream=bool(request.stream))
    except BaseException:
        ticket.close()
        raise


def _find_forced(request: ChatRequest) -> dict[str, Any] | None:
    """The schema of the calls that must come, where `tool_choice` says so."""
    choice = request.tool_choice
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    if choice in (None, "none", "auto"):
        return None
    name = choice.function.name if isinstance(choice, NamedChoice) else None
    with refuse_in_words("tools"):
        return tool_schema(tools, name, is_parallel=request.parallel_tool_calls is not False)


@dataclasses.dataclass
class _Turn:
    """What one answer has said so far."""

    tools: ToolCallParser | None
    content: list[str]
    calls: list[ToolCall]
    logprobs: list[TokenLogprob]
    finish_reason: str = ""
    stop_reason: int | str | None = None


@dataclasses.dataclass(frozen=True)
class _News:
    """What a piece adds to an answer, in OpenAI's words."""

    content: str
    calls: list[tuple[int, ToolCall]]
    logprobs: ChatLogprobs | None


class _Chat:
    """The answers to one request, on their way."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        model: str,
        prompt: Prompt,
        ticket: RequestHandle,
        answers: list[CompletionBuilder],
    ):
        self._service, self._request, self._model = service, request, model
        self._prompt, self._ticket, self._answers = prompt, ticket, answers
        self._id = make_id("chatcmpl")
        self._speller = Speller(service.tokenizer, request.return_tokens_as_token_ids)
        self.tally = UsageCounter(prompt_tokens=len(prompt.token_ids))
        reads_calls = bool(request.tools) and request.tool_choice != "none"
        names = [tool.function.name for tool in request.tools or ()]
        self._turns = [
            _Turn(ToolCallParser(names) if reads_calls else None, [], [], []) for _ in answers
        ]

    async def collect(self) -> ChatResponse:
        """All answers, once they have ended."""
        prompt_logprobs = None
        async for part in self._follow():
            self._take(part)
            prompt_logprobs = part.prompt_logprobs or prompt_logprobs
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(
                    content="".join(turn.content) or (None if turn.calls else ""),
                    tool_calls=turn.calls,
                ),
                logprobs=ChatLogprobs(content=turn.logprobs) if self._request.logprobs else None,
                finish_reason=turn.finish_reason,
                stop_reason=turn.stop_reason,
            )
            for index, turn in enumerate(self._turns)
        ]
        return ChatResponse(
            id=self._id,
            created=int(time.time()),
            model=self._model,
            choices=choices,
            usage=self.tally.spell(),
            prompt_logprobs=self._spell_prompt(prompt_logprobs),
        )

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """`chat.completion.chunk` objects."""
        created, notes = int(time.time()), note_usage(self._request.stream_options)
        base = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": self._model,
        }
        for index in range(len(self._turns)):
            delta = {"role": "assistant", "content": ""}
            yield notes.add(base | {"choices": [_make_choice(index, delta)]}, self.tally)
        async for part in self._follow():
            news, turn = self._take(part), self._turns[part.index]
            head = base
            if part.prompt_logprobs is not None:
                head = base | {"prompt_logprobs": self._spell_prompt(part.prompt_logprobs)}
            for choice in self._make_choices(part.index, news, turn):
                yield notes.add(head | {"choices": [choice]}, self.tally)
                head = base
        if notes.has_last:
            yield base | {"choices": [], "usage": self.tally.spell().model_dump()}

    def _follow(self) -> AsyncIterator[Part]:
        return self._service.follow(self._ticket, self._answers, self.tally, self._request.n)

    def _take(self, part: Part) -> _News:
        turn, piece = self._turns[part.index], part.piece
        text, calls = piece.text, []
        if turn.tools is not None:
            events = turn.tools.push(piece.text)
            if piece.finish_reason is not None:
                events += turn.tools.finish()
            text = "".join(event.text for event in events if not isinstance(event, CallDelta))
            calls = self._keep_calls(turn, events)
        logprobs = None
        if self._request.logprobs:
            logprobs = self._speller.spell_chat(piece.token_ids, piece.logprobs)
            turn.logprobs += logprobs.content
        turn.content.append(text)
        if piece.finish_reason is not None:
            is_called = turn.calls and piece.finish_reason == "stop"
            turn.finish_reason = "tool_calls" if is_called else piece.finish_reason
            turn.stop_reason = piece.stop_reason
        return _News(text, calls, logprobs)

    def _keep_calls(self, turn: _Turn, events: list) -> list[tuple[int, ToolCall]]:
        """The new calls; only the first of an answer where there may be but one."""
        new = []
        for event in events:
            has_room = self._request.parallel_tool_calls is not False or not turn.calls
            if isinstance(event, CallDelta) and has_room:
                function = FunctionCall(name=event.call.name, arguments=event.call.arguments)
                call = ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=function)
                new.append((len(turn.calls), call))
                turn.calls.append(call)
        return new

    def _make_choices(self, index: int, news: _News, turn: _Turn) -> list[dict[str, Any]]:
        """The chunks' choices for what a piece brought: the text, each call, the end."""
        choices = []
        if news.content or (news.logprobs and news.logprobs.content):
            choices.append(_make_choice(index, {"content": news.content}, news.logprobs))
        for place, call in news.calls:
            delta = {"tool_calls": [{"index": place, **call.model_dump()}]}
            choices.append(_make_choice(index, delta))
        if turn.finish_reason:
            end = _make_choice(index, {})
            end |= {"finish_reason": turn.finish_reason, "stop_reason": turn.stop_reason}
            choices.append(end)
        return choices

    def _spell_prompt(self, found: list | None) -> list[dict[str, Any] | None] | None:
        return None if found is None else self._speller.spell_prompt(self._prompt.token_ids, found)


def _make_choice(
    index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": None if logprobs is None else logprobs.model_dump(),
        "finish_reason": None,
    }
