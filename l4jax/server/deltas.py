"""Updates of a request handle to deltas of text."""

import dataclasses
from collections.abc import AsyncIterator

from l4jax.engine.request import TokenLogprobs
from l4jax.outputs import CompletionBuilder, CompletionDelta
from l4jax.server.handle import RequestHandle
from l4jax.server.usage import UsageCounter
from l4jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class IndexedDelta:
    """A delta of choice `index`, with the logprobs of its prompt if this update has them."""

    index: int
    delta: CompletionDelta
    prompt_logprobs: list[TokenLogprobs | None] | None


async def iterate_deltas(
    handle: RequestHandle, tokenizer: Tokenizer, usage: UsageCounter, n: int
) -> AsyncIterator[IndexedDelta]:
    """Iterate over the deltas of submitted requests until all have ended.

    Args:
        handle: whose requests were submitted.
        tokenizer: the model's.
        usage: counts the tokens.
        n: requests per prompt.

    Raises:
        ApiError: a step failed, a deadline passed, or the server shuts down.
    """
    builders = [CompletionBuilder(tokenizer, request.params) for request in handle.requests]
    while any(builder.finish_reason is None for builder in builders):
        index, update = await handle.receive()
        builder = builders[index]
        if builder.request_id is None and index % n == 0:  # counted once per prompt
            usage.cached_tokens += update.cached_tokens
        delta = builder.add(update)
        usage.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            handle.end(index, delta.finish_reason)
        yield IndexedDelta(index, delta, update.prompt_logprobs)
