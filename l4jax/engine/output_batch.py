"""The sampled tokens and log-probabilities of each request, read from a step's output arrays."""

import dataclasses
from typing import Any

import numpy as np

from l4jax import sampling
from l4jax.engine.input_batch import enumerate_rows
from l4jax.engine.request import Request, TokenLogprobs
from l4jax.engine.scheduler import ScheduledChunk, SchedulerOutput


@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """The results of a scheduled chunk.

    Attributes:
        token_ids: sampled tokens, in order.
        logprobs: of each sampled token, if requested.
        prompt_logprobs: from position `prompt_start` of the prompt on, if requested.
    """

    chunk: ScheduledChunk
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list[TokenLogprobs])
    prompt_start: int = 0


def read_step(
    output: SchedulerOutput, sampled: Any, prompt_logprobs: Any, tokens: int, rows: int
) -> list[SampledTokens]:
    """Read the results of a step: with drafts, the accepted ones and one sampled token.

    Args:
        output: of the scheduler.
        sampled: `sampling.Sampled` of all rows, on the host.
        prompt_logprobs: `decode.PromptLogprobs` of all tokens, on the host; None if not requested.
        tokens, rows: of the step's bucket.
    """
    found: list[SampledTokens] = []
    width = len(sampled.token_R) // (len(output.chunks) * rows)
    for shard, chunks in enumerate(output.chunks):
        stop = shard * tokens
        for row, chunk in enumerate(chunks):
            start, stop = stop, stop + chunk.stop - chunk.start
            first = (shard * rows + row) * width
            token_ids = sampled.token_R[first : first + chunk.max_sampled].tolist()
            accepted = count_accepted(token_ids, chunk.drafts) if chunk.max_sampled else 0
            token_ids, logprobs = token_ids[: accepted + 1], list[TokenLogprobs]()
            for index in range(len(token_ids)):
                logprobs += _read_logprobs(chunk.request, sampled, first + index)
            its_prompt: list[TokenLogprobs] = []
            if prompt_logprobs is not None:
                its_prompt = _read_prompt_logprobs(chunk, prompt_logprobs, start)
            if token_ids or its_prompt:
                found.append(SampledTokens(chunk, token_ids, logprobs, its_prompt, chunk.start + 1))
    return found


def read_loop(output: SchedulerOutput, decoded: Any, rows: int) -> list[SampledTokens]:
    """Read the results of a decode loop: `decode.DecodedTokens`, on the host."""
    found: list[SampledTokens] = []
    for row, chunk in enumerate_rows(output, rows):
        token_ids = [token for token in decoded.token_SR[:, row].tolist() if token >= 0]
        logprobs: list[TokenLogprobs] = []
        for step in range(len(token_ids)):
            logprobs += _read_logprobs(chunk.request, _get_step(decoded, step), row)
        found.append(SampledTokens(chunk, token_ids, logprobs))
    return found


def count_accepted(token_ids: list[int], drafts: tuple[int, ...]) -> int:
    """Count the leading draft tokens that equal the sampled ones."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == token_ids[accepted]:
        accepted += 1
    return accepted


def _read_logprobs(request: Request, sampled: Any, row: int) -> list[TokenLogprobs]:
    """Read the log-probabilities of a row's token: one entry, or none if not requested."""
    count = request.params.logprobs
    if count is None or sampled.logprob_R is None:
        return []
    top = _read_top(sampled.top_token_RL[row], sampled.top_logprob_RL[row], count)
    return [TokenLogprobs(float(sampled.logprob_R[row]), top)]


def _read_prompt_logprobs(
    chunk: ScheduledChunk, prompt_logprobs: Any, start: int
) -> list[TokenLogprobs]:
    """Read the log-probabilities of the prompt tokens that follow each of a chunk's tokens."""
    count, last = chunk.request.params.prompt_logprobs, chunk.request.prompt_length - 1
    if count is None:
        return []
    return [
        TokenLogprobs(
            float(prompt_logprobs.logprob_T[index]),
            _read_top(
                prompt_logprobs.top_token_TL[index], prompt_logprobs.top_logprob_TL[index], count
            ),
        )
        for index in range(start, start + max(0, min(chunk.stop, last) - chunk.start))
    ]


def _read_top(token_L: np.ndarray, logprob_L: np.ndarray, count: int) -> dict[int, float]:
    return dict(zip(token_L[:count].tolist(), logprob_L[:count].tolist(), strict=True))


def _get_step(decoded: Any, step: int) -> sampling.Sampled:
    """Return one step of a loop's results."""
    fields = (getattr(decoded, field.name) for field in dataclasses.fields(decoded))
    token_R, *rest = (None if leaf is None else leaf[step] for leaf in fields)
    return sampling.Sampled(token_R, *rest)  # type: ignore[arg-type]
