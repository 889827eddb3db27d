"""The arrays of a step: filled from a scheduler output on the host, and read back by request."""

import dataclasses
from typing import Any

import numpy as np

from l4jax import cache, decode, sampling
from l4jax.config import Config
from l4jax.engine.request import (
    MAX_BIASES,
    MAX_STOP_IDS,
    Constraints,
    Request,
    TokenLogprobs,
)
from l4jax.engine.scheduler import Limits, ScheduledChunk, SchedulerOutput


@dataclasses.dataclass(frozen=True)
class Step:
    """Inputs of `decode.step`, as numpy arrays."""

    batch: cache.Batch
    logit_indices: decode.LogitIndices
    sampling_metadata: sampling.SamplingMetadata


@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """The tokens that a step sampled for a scheduled chunk.

    Attributes:
        token_ids: sampled tokens, in order.
        logprobs: logprobs of each token, if prompt for.
        prompt_logprobs: logprobs of the prompt from position `prompt_start` on, if prompt for.
    """

    chunk: ScheduledChunk
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_start: int = 0


def fill_step(
    output: SchedulerOutput,
    limits: Limits,
    config: Config,
    tokens: int,
    rows: int,
    *,
    has_targets: bool = False,
) -> Step:
    """Fill the arrays of a step of `tokens` tokens and `rows` rows per data shard, with padding."""
    size, slots = limits.shards * tokens, limits.shards * limits.requests
    batch = cache.Batch(
        token_T=np.zeros(size, np.int32),
        position_T=np.full(size, -1, np.int32),
        row_T=np.zeros(size, np.int32),
        tables=_make_tables(limits, rows),
        feature_T=np.full(size, -1, np.int32) if limits.feature_slots else None,
    )
    logit_indices = decode.LogitIndices(
        at_RW=np.zeros((limits.shards * rows, 1 + limits.drafts), np.int32),
        slot_R=np.full(limits.shards * rows, slots, np.int32),
        target_T=np.full(size, -1, np.int32) if has_targets else None,
    )
    for shard, chunks in enumerate(output.runs):
        at = shard * tokens
        for row, chunk in enumerate(chunks):
            here = slice(at, at + chunk.stop - chunk.start)
            at, number = here.stop, shard * rows + row
            batch.token_T[here] = _find_tokens(chunk)
            batch.position_T[here] = np.arange(chunk.start, chunk.stop)
            batch.row_T[here] = row
            _fill_tables(batch.tables, number, chunk)
            if batch.feature_T is not None and config.vision is not None:
                _fill_features(batch.feature_T[here], chunk, config.vision.features)
            first = at - 1 - len(chunk.drafts)
            logit_indices.at_RW[number] = np.minimum(first + np.arange(1 + limits.drafts), at - 1)
            if chunk.draws:
                logit_indices.slot_R[number] = chunk.request.slot
            if logit_indices.target_T is not None:
                _fill_targets(logit_indices.target_T[here], chunk)
    return Step(batch, logit_indices, fill_sampling_metadata(output, limits, rows))


def fill_loop(
    output: SchedulerOutput, limits: Limits, rows: int
) -> tuple[decode.DecodeRows, cache.PageTables, sampling.SamplingMetadata]:
    """Fill the arrays of a decode loop of `rows` rows per data shard."""
    size = limits.shards * rows
    decode_rows = decode.DecodeRows(
        token_R=np.zeros(size, np.int32),
        position_R=np.full(size, -1, np.int32),
        row_R=np.tile(np.arange(rows, dtype=np.int32), limits.shards),
        slot_R=np.full(size, limits.shards * limits.requests, np.int32),
        limit_R=np.zeros(size, np.int32),
        stop_RL=np.full((size, MAX_STOP_IDS), -1, np.int32),
    )
    tables = _make_tables(limits, rows)
    for row, chunk in enumerate_rows(output, rows):
        decode_rows.token_R[row] = _find_token(chunk.request, chunk.start)
        decode_rows.position_R[row] = chunk.start
        decode_rows.slot_R[row] = chunk.request.slot
        decode_rows.limit_R[row] = chunk.draws
        stops = chunk.request.stop_ids[:MAX_STOP_IDS]  # the engine checks all of them
        decode_rows.stop_RL[row, : len(stops)] = stops
        _fill_tables(tables, row, chunk)
    return decode_rows, tables, fill_sampling_metadata(output, limits, rows)


def fill_sampling_metadata(
    output: SchedulerOutput, limits: Limits, rows: int
) -> sampling.SamplingMetadata:
    """Fill the sampling settings of each row; padding is greedy."""
    size = limits.shards * rows
    metadata = sampling.SamplingMetadata(
        temperature_R=np.zeros(size, np.float32),
        top_k_R=np.zeros(size, np.int32),
        top_p_R=np.ones(size, np.float32),
        min_p_R=np.zeros(size, np.float32),
        seed_R=np.zeros(size, np.uint32),
    )
    for row, chunk in enumerate_rows(output, rows):
        params = chunk.request.params
        metadata.temperature_R[row] = params.temperature
        metadata.top_k_R[row] = max(params.top_k, 0)
        metadata.top_p_R[row] = params.top_p
        metadata.min_p_R[row] = params.min_p
        metadata.seed_R[row] = chunk.request.seed % 2**32
    return metadata


def fill_logits_processors(
    output: SchedulerOutput, limits: Limits, rows: int, vocab: int
) -> sampling.LogitsProcessors:
    """Fill the logits processors of each row; padding changes nothing."""
    size = limits.shards * rows
    found = sampling.LogitsProcessors(
        slot_R=np.full(size, limits.shards * limits.requests, np.int32),
        presence_R=np.zeros(size, np.float32),
        frequency_R=np.zeros(size, np.float32),
        repetition_R=np.ones(size, np.float32),
        bias_token_RL=np.full((size, MAX_BIASES), -1, np.int32),
        bias_RL=np.zeros((size, MAX_BIASES), np.float32),
        floor_R=np.zeros(size, np.int32),
        stop_RL=np.full((size, MAX_STOP_IDS), -1, np.int32),
        allowed_RL=np.full((size, -(-vocab // 32)), -1, np.int32),
    )
    for row, chunk in enumerate_rows(output, rows):
        request, params = chunk.request, chunk.request.params
        if params.has_penalties:
            found.slot_R[row] = request.slot
        found.presence_R[row] = params.presence_penalty
        found.frequency_R[row] = params.frequency_penalty
        found.repetition_R[row] = params.repetition_penalty
        biases = params.logit_bias or {}
        found.bias_token_RL[row, : len(biases)] = list(biases)
        found.bias_RL[row, : len(biases)] = list(biases.values())
        matcher = request.constraints.matcher
        if matcher is None:  # a grammar decides itself where the answer ends
            found.floor_R[row] = request.prompt_length + params.min_tokens
        elif chunk.draws:
            found.allowed_RL[row] = matcher.mask()
        stops = request.stop_ids[:MAX_STOP_IDS]
        found.stop_RL[row, : len(stops)] = stops
        for token in find_banned_tokens(request.constraints, request.output):
            found.allowed_RL[row, token // 32] &= ~np.int32(
                np.uint32(1 << token % 32).view(np.int32)
            )
    return found


def count_seen(request: Request, vocab: int) -> np.ndarray:
    """int32 [V]: token counts of prompt and answer, as `sampling.LogitsProcessors` reads them."""
    seen_V = np.bincount(request.output, minlength=vocab).astype(np.int32)
    seen_V[request.tokens[: request.prompt_length]] += sampling.IN_PROMPT
    return seen_V


def find_banned_tokens(constraints: Constraints, output: list[int]) -> list[int]:
    """Return the tokens that would complete a banned word."""
    return [
        word[-1]
        for word in constraints.bad_words
        if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]
    ]


def enumerate_rows(output: SchedulerOutput, rows: int) -> list[tuple[int, ScheduledChunk]]:
    """Return each scheduled chunk with its row index over all data shards."""
    return [
        (shard * rows + row, chunk)
        for shard, chunks in enumerate(output.runs)
        for row, chunk in enumerate(chunks)
    ]


def read_step(
    output: SchedulerOutput, sampled: Any, prompt_logprobs: Any, tokens: int, rows: int
) -> list[SampledTokens]:
    """Read the sampled tokens of each chunk: the accepted draft tokens, and one more."""
    found = []
    width = len(sampled.token_R) // (len(output.runs) * rows)
    for shard, chunks in enumerate(output.runs):
        at = shard * tokens
        for row, chunk in enumerate(chunks):
            start, at = at, at + chunk.stop - chunk.start
            first = (shard * rows + row) * width
            sampled_ids = sampled.token_R[first : first + chunk.draws].tolist()
            right = _count_accepted(sampled_ids, chunk.drafts) if chunk.draws else 0
            sampled_ids, logprobs = sampled_ids[: right + 1], []
            for place in range(len(sampled_ids)):
                logprobs += _read_logprobs(chunk.request, sampled, first + place)
            prompt = (
                []
                if prompt_logprobs is None
                else _read_prompt_logprobs(chunk, prompt_logprobs, slice(start, at))
            )
            if sampled_ids or prompt:
                found.append(SampledTokens(chunk, sampled_ids, logprobs, prompt, chunk.start + 1))
    return found


def read_loop(output: SchedulerOutput, decoded: Any, rows: int) -> list[SampledTokens]:
    """Read the sampled tokens of each row of a decode loop."""
    found = []
    for row, chunk in enumerate_rows(output, rows):
        sampled_ids = [token for token in decoded.token_SR[:, row].tolist() if token >= 0]
        logprobs: list[TokenLogprobs] = []
        for step in range(len(sampled_ids)):
            logprobs += _read_logprobs(chunk.request, _take_step(decoded, step), row)
        found.append(SampledTokens(chunk, sampled_ids, logprobs))
    return found


def _find_token(request: Request, at: int) -> int:
    """Return the token at a position, or -1 - slot where only the device knows it."""
    return request.tokens[at] if at < len(request.tokens) else -1 - request.slot


def _find_tokens(chunk: ScheduledChunk) -> list[int]:
    known = chunk.request.tokens[chunk.start : chunk.stop - len(chunk.drafts)]
    return [*(known or [_find_token(chunk.request, chunk.start)]), *chunk.drafts]


def _fill_features(feature_T: np.ndarray, chunk: ScheduledChunk, features: int) -> None:
    """Fill the index of each image token in the flat feature buffer; text stays -1."""
    positions = chunk.request.patch_positions
    if not chunk.feature_slots or positions is None:
        return
    # The n-th image token of the prompt takes the n-th feature of its tiles.
    first, last = np.searchsorted(positions, (chunk.start, chunk.stop))
    tile, within = np.divmod(np.arange(first, last), features)
    feature_T[positions[first:last] - chunk.start] = (
        np.array(chunk.feature_slots, np.int32)[tile] * features + within
    )


def _fill_targets(target_T: np.ndarray, chunk: ScheduledChunk) -> None:
    """Fill the next prompt token at each token of a chunk, if its request asks for logprobs."""
    request = chunk.request
    if request.params.prompt_logprobs is None:
        return
    following = request.tokens[chunk.start + 1 : min(chunk.stop + 1, request.prompt_length)]
    target_T[: len(following)] = following


def _make_tables(limits: Limits, rows: int) -> cache.PageTables:
    size, page = limits.shards * rows, limits.page
    whole = -(-limits.max_length // page)
    chunk = -(-min(limits.chunk, limits.max_length) // page)
    return cache.PageTables(
        np.zeros((size, whole), np.int32), np.zeros((limits.local_groups, size, chunk), np.int32)
    )


def _fill_tables(tables: cache.PageTables, row: int, chunk: ScheduledChunk) -> None:
    tables.global_RB[row, : len(chunk.request.global_pages)] = chunk.request.global_pages
    for group, pages in enumerate(chunk.local_pages):
        tables.local_GRB[group, row, : len(pages)] = pages


def _count_accepted(sampled_ids: list[int], drafts: tuple[int, ...]) -> int:
    """Count the leading draft tokens that equal the sampled ones."""
    right = 0
    while right < len(drafts) and drafts[right] == sampled_ids[right]:
        right += 1
    return right


def _read_logprobs(request: Request, sampled: Any, row: int) -> list[TokenLogprobs]:
    """Read the logprobs of a row's token: one entry, or none if not prompt for."""
    count = request.params.logprobs
    if count is None or sampled.logprob_R is None:
        return []
    top = _read_top(sampled.top_token_RL[row], sampled.top_logprob_RL[row], count)
    return [TokenLogprobs(float(sampled.logprob_R[row]), top)]


def _read_prompt_logprobs(
    chunk: ScheduledChunk, prompt_logprobs: Any, here: slice
) -> list[TokenLogprobs]:
    """Read the prompt logprobs of a chunk, if its request asks for them."""
    count, last = chunk.request.params.prompt_logprobs, chunk.request.prompt_length - 1
    if count is None:
        return []
    return [
        TokenLogprobs(
            float(prompt_logprobs.logprob_T[at]),
            _read_top(prompt_logprobs.top_token_TL[at], prompt_logprobs.top_logprob_TL[at], count),
        )
        for at in range(here.start, here.start + max(0, min(chunk.stop, last) - chunk.start))
    ]


def _read_top(token_L: np.ndarray, logprob_L: np.ndarray, count: int) -> dict[int, float]:
    return dict(zip(token_L[:count].tolist(), logprob_L[:count].tolist(), strict=True))


def _take_step(decoded: Any, step: int) -> sampling.Sampled:
    """Return one step of a decode loop's results."""
    fields = (getattr(decoded, field.name) for field in dataclasses.fields(decoded))
    token_R, *rest = (None if leaf is None else leaf[step] for leaf in fields)
    return sampling.Sampled(token_R, *rest)  # type: ignore[arg-type]
