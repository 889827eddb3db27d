"""`POST /v1/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response

from l4jax.engine.request import TokenLogprobs
from l4jax.server.deltas import IndexedDelta, iterate_deltas
from l4jax.server.handle import RequestHandle
from l4jax.server.logprobs import CompletionLogprobsBuilder, LogprobsFormatter, join_logprobs
from l4jax.server.params import make_completion_params
from l4jax.server.protocol import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
)
from l4jax.server.responses import respond
from l4jax.server.service import Service
from l4jax.server.usage import StreamUsage, UsageCounter
from l4jax.text.chat import Prompt
from l4jax.text.tokenizer import Tokenizer

_VLLM_FIELDS = {"prompt_logprobs"}  # absent from a stream unless requested


async def create_completion(service: Service, body: CompletionRequest) -> Response:
    """Complete one prompt or several, as a whole or as a stream.

    Raises:
        ApiError: for a request that cannot be completed.
    """
    model = service.get_model(body.model)
    params = make_completion_params(body, service.defaults, service.options)
    inputs = split_prompts(body.prompt)
    handle = service.loop.reserve(max(1, len(inputs)) * body.n)
    try:
        special = body.add_special_tokens
        prompts = [
            await service.preprocessor.encode_text(one, add_special_tokens=special)
            if isinstance(one, str)
            else Prompt(tuple(one), ())
            for one in inputs
        ]
        requests = await service.preprocessor.make_requests(prompts, params)
        await handle.submit(requests, "prompt")
        reply = CompletionReply(body, model, inputs, prompts, handle, service.tokenizer)
        return await respond(reply, handle.close, is_stream=bool(body.stream))
    except BaseException:
        handle.close()
        raise


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """Split `prompt` (a text, texts, token ids, or lists of token ids) into prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or isinstance(prompt[0], int):
        return [prompt]  # an empty list is refused as a prompt without tokens
    return list(prompt)


class CompletionReply:
    """Formats the deltas of one completion request.

    Args:
        body: of the request.
        model: name in the response.
        inputs: prompts of the body; choice i is for prompt i // n.
        prompts: the same, encoded.
        handle: with the submitted requests, one per choice.
        tokenizer: the model's.
    """

    def __init__(
        self,
        body: CompletionRequest,
        model: str,
        inputs: list[str | list[int]],
        prompts: list[Prompt],
        handle: RequestHandle,
        tokenizer: Tokenizer,
    ):
        self._body, self._inputs, self._prompts = body, inputs, prompts
        self._handle, self._tokenizer = handle, tokenizer
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._formatter = LogprobsFormatter(tokenizer, body.return_tokens_as_token_ids)
        self._logprobs = [
            CompletionLogprobsBuilder(self._formatter, tokenizer, body.skip_special_tokens)
            for _ in handle.requests
        ]
        self._has_started = [False] * len(handle.requests)
        self.usage = UsageCounter(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))

    async def collect(self) -> CompletionResponse:
        """Return all choices after the last delta."""
        found: list[list[CompletionChoice]] = [[] for _ in self._handle.requests]
        async for part in self._iterate():
            found[part.index].append(self._format(part))
        return CompletionResponse(
            **self._head,
            choices=[_join_choices(parts) for parts in found],
            usage=self.usage.to_usage(),
        )

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield `text_completion` objects, each with a delta of one choice."""
        stream_usage = StreamUsage.from_options(self._body.stream_options)
        base = self._head | {"object": "text_completion"}
        async for part in self._iterate():
            choice = self._format(part)
            has_logprobs = choice.logprobs is not None and choice.logprobs.tokens
            if choice.text or choice.finish_reason or has_logprobs or choice.prompt_logprobs:
                hidden = None if choice.prompt_logprobs else _VLLM_FIELDS
                chunk = base | {"choices": [choice.model_dump(exclude=hidden)]}
                yield stream_usage.add(chunk, self.usage)
        if stream_usage.has_final:
            yield base | {"choices": [], "usage": self.usage.to_usage().model_dump()}

    def _iterate(self) -> AsyncIterator[IndexedDelta]:
        return iterate_deltas(self._handle, self._tokenizer, self.usage, self._body.n)

    def _format(self, part: IndexedDelta) -> CompletionChoice:
        """Format a delta as a choice; with `echo` the first one of a choice has the prompt."""
        index, delta, body = part.index, part.delta, self._body
        text, tokens = delta.text, delta.token_ids
        logprobs: list[TokenLogprobs | None] = [*delta.logprobs]
        if body.max_tokens == 0:
            text, tokens, logprobs = "", [], []
            self.usage.completion_tokens = 0
        prompt = self._prompts[index // body.n]
        if body.echo and not self._has_started[index]:
            text = self._get_prompt_text(index // body.n) + text
            tokens = [*prompt.token_ids, *tokens]
            if body.logprobs is not None:
                assert part.prompt_logprobs is not None  # in the update of the first token
                logprobs = [*part.prompt_logprobs, *logprobs]
        self._has_started[index] = True
        prompt_logprobs = None
        if body.prompt_logprobs is not None and part.prompt_logprobs is not None:
            prompt_logprobs = self._formatter.format_prompt(prompt.token_ids, part.prompt_logprobs)
        has_logprobs = body.logprobs is not None
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs[index].add(tokens, logprobs) if has_logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            prompt_logprobs=prompt_logprobs,
        )

    def _get_prompt_text(self, number: int) -> str:
        prompt = self._inputs[number]
        if isinstance(prompt, str):
            return prompt
        skips = self._body.skip_special_tokens
        return self._tokenizer.decode(prompt, skip_special_tokens=skips)


def _join_choices(parts: list[CompletionChoice]) -> CompletionChoice:
    last, logprobs = parts[-1], [part.logprobs for part in parts if part.logprobs is not None]
    prompts = [part.prompt_logprobs for part in parts if part.prompt_logprobs is not None]
    return CompletionChoice(
        index=last.index,
        text="".join(part.text for part in parts),
        logprobs=join_logprobs(logprobs) if logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=prompts[0] if prompts else None,
    )
