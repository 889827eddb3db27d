"""`POST /v1/completions`: prompts in, their continuations out, with the prompts if asked."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response

from l4jax.engine.request import TokenLogprobs
from l4jax.outputs import CompletionBuilder
from l4jax.server.logprobs import Ledger, Speller, join
from l4jax.server.loop import RequestHandle
from l4jax.server.params import read_completion_params
from l4jax.server.protocol import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
)
from l4jax.server.replies import hand_over, note_usage
from l4jax.server.service import Part, Service, make_id
from l4jax.server.usage import UsageCounter
from l4jax.text.chat import Prompt

_EXTRA = {"prompt_logprobs"}  # vLLM's, in a stream only where it was asked for


async def answer_completion(service: Service, request: CompletionRequest) -> Response:
    """Continue one prompt or several, at once or as a stream.

    Raises:
        ApiError: for what cannot be continued.
    """
    model = service.find_model(request.model)
    params = read_completion_params(request, service.defaults, service.options)
    asked = split_prompts(request.prompt)
    ticket = service.reserve(max(1, len(asked)) * request.n)
    try:
        prompts = [
            await service.spell(one, request.add_special_tokens)
            if isinstance(one, str)
            else Prompt(tuple(one), ())
            for one in asked
        ]
        answers = await service.start(ticket, prompts, params, "prompt")
        work = _Completion(service, request, model, asked, prompts, ticket, answers)
        return await hand_over(work, ticket.close, is_stream=bool(request.stream))
    except BaseException:
        ticket.close()
        raise


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a request: a text, texts, ids, or lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or isinstance(prompt[0], int):
        return [prompt]  # an empty one is refused as a prompt without tokens
    return list(prompt)


class _Completion:
    """The texts of one request, on their way."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        model: str,
        asked: list[str | list[int]],
        prompts: list[Prompt],
        ticket: RequestHandle,
        answers: list[CompletionBuilder],
    ):
        self._service, self._request, self._model = service, request, model
        self._asked, self._prompts = asked, prompts
        self._ticket, self._answers = ticket, answers
        self._id = make_id("cmpl")
        self._speller = Speller(service.tokenizer, request.return_tokens_as_token_ids)
        self._ledgers = [
            Ledger(self._speller, service.tokenizer, request.skip_special_tokens) for _ in answers
        ]
        self._has_begun = [False] * len(answers)
        self.tally = UsageCounter(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))

    async def collect(self) -> CompletionResponse:
        """All texts, once they have ended."""
        found: list[list[CompletionChoice]] = [[] for _ in self._answers]
        async for part in self._follow():
            found[part.index].append(self._take(part))
        return CompletionResponse(
            id=self._id,
            created=int(time.time()),
            model=self._model,
            choices=[_join_choices(pieces) for pieces in found],
            usage=self.tally.spell(),
        )

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """`text_completion` objects, each with a piece of one text."""
        notes = note_usage(self._request.stream_options)
        base = {
            "id": self._id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._model,
        }
        async for part in self._follow():
            choice = self._take(part)
            has_logprobs = choice.logprobs is not None and choice.logprobs.tokens
            if choice.text or choice.finish_reason or has_logprobs or choice.prompt_logprobs:
                spelled = choice.model_dump(exclude=None if choice.prompt_logprobs else _EXTRA)
                yield notes.add(base | {"choices": [spelled]}, self.tally)
        if notes.has_last:
            yield base | {"choices": [], "usage": self.tally.spell().model_dump()}

    def _follow(self) -> AsyncIterator[Part]:
        return self._service.follow(self._ticket, self._answers, self.tally, self._request.n)

    def _take(self, part: Part) -> CompletionChoice:
        """A part as a choice; the first one of a text brings the prompt, if that was asked for."""
        index, piece, request = part.index, part.piece, self._request
        text, tokens = piece.text, piece.token_ids
        logprobs: list[TokenLogprobs | None] = [*piece.logprobs]
        if request.max_tokens == 0:
            text, tokens, logprobs = "", [], []
            self.tally.completion_tokens = 0
        prompt = self._prompts[index // request.n]
        if request.echo and not self._has_begun[index]:
            text = self._spell_prompt(index // request.n) + text
            tokens = [*prompt.token_ids, *tokens]
            if request.logprobs is not None:
                assert part.prompt_logprobs is not None  # they come before the first token
                logprobs = [*part.prompt_logprobs, *logprobs]
        self._has_begun[index] = True
        prompt_logprobs = None
        if request.prompt_logprobs is not None and part.prompt_logprobs is not None:
            prompt_logprobs = self._speller.spell_prompt(prompt.token_ids, part.prompt_logprobs)
        has_logprobs = request.logprobs is not None
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._ledgers[index].take(tokens, logprobs) if has_logprobs else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            prompt_logprobs=prompt_logprobs,
        )

    def _spell_prompt(self, place: int) -> str:
        asked = self._asked[place]
        if isinstance(asked, str):
            return asked
        skips = self._request.skip_special_tokens
        return self._service.tokenizer.decode(asked, skip_special_tokens=skips)


def _join_choices(pieces: list[CompletionChoice]) -> CompletionChoice:
    last, ledgers = pieces[-1], [piece.logprobs for piece in pieces if piece.logprobs is not None]
    prompts = [piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None]
    return CompletionChoice(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        logprobs=join(ledgers) if ledgers else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=prompts[0] if prompts else None,
    )
