"""The input arrays of a step or a loop, filled on the host from the scheduler's output."""

from typing import Any

import numpy as np

from l4jax import cache, decode, sampling
from l4jax.config import Config
from l4jax.engine.request import (
    GREEDY_TEMPERATURE,
    MAX_BIASES,
    MAX_STOP_IDS,
    Constraints,
    Request,
)
from l4jax.engine.scheduler import Limits, ScheduledChunk, SchedulerOutput


def fill_batch(
    output: SchedulerOutput,
    limits: Limits,
    config: Config,
    tokens: int,
    rows: int,
    *,
    has_logits_processors: bool,
) -> list[tuple[Any, Any]]:
    """Fill all inputs of `decode.step`, or of `decode.decode_loop` if the output is a loop.

    Args:
        output: of the scheduler.
        limits: sizes.
        config: of the model.
        tokens, rows: of the bucket, per data shard.
        has_logits_processors: whether the program applies them and reports log-probabilities.

    Returns:
        Each argument after the state, with the logical names of its axes.
    """
    metadata = fill_sampling_metadata(output, limits, rows), sampling.SAMPLING_METADATA_AXES
    processors = None, None
    if has_logits_processors:
        processors = (
            fill_logits_processors(output, limits, rows, config.text.vocab),
            sampling.LOGITS_PROCESSORS_AXES,
        )
    if output.is_loop:
        decode_rows, tables = fill_loop(output, limits, rows)
        return [
            (decode_rows, decode.DECODE_ROWS_AXES),
            (tables, cache.name_axes().tables),
            metadata,
            processors,
        ]
    batch, logit_indices = fill_step(
        output, limits, config, tokens, rows, has_targets=has_logits_processors
    )
    return [
        (batch, cache.name_axes(has_features=batch.feature_T is not None)),
        (logit_indices, decode.name_logit_indices_axes(has_targets=has_logits_processors)),
        metadata,
        processors,
    ]


def fill_step(
    output: SchedulerOutput,
    limits: Limits,
    config: Config,
    tokens: int,
    rows: int,
    *,
    has_targets: bool = False,
) -> tuple[cache.Batch, decode.LogitIndices]:
    """Fill the tokens of a step, padded to this many tokens and rows per data shard."""
    size, slots = limits.shards * tokens, limits.shards * limits.requests
    batch = cache.Batch(
        token_T=np.zeros(size, np.int32),
        position_T=np.full(size, -1, np.int32),
        row_T=np.zeros(size, np.int32),
        tables=_make_tables(limits, rows),
        feature_T=np.full(size, -1, np.int32) if limits.feature_slots else None,
    )
    logit_indices = decode.LogitIndices(
        index_RW=np.zeros((limits.shards * rows, 1 + limits.drafts), np.int32),
        slot_R=np.full(limits.shards * rows, slots, np.int32),
        target_T=np.full(size, -1, np.int32) if has_targets else None,
    )
    for shard, chunks in enumerate(output.chunks):
        stop = shard * tokens
        for row_in_shard, chunk in enumerate(chunks):
            here = slice(stop, stop + chunk.stop - chunk.start)
            stop, row = here.stop, shard * rows + row_in_shard
            batch.token_T[here] = _list_tokens(chunk)
            batch.position_T[here] = np.arange(chunk.start, chunk.stop)
            batch.row_T[here] = row_in_shard
            _fill_tables(batch.tables, row, chunk)
            if batch.feature_T is not None and config.vision is not None:
                _fill_features(batch.feature_T[here], chunk, config.vision.features)
            first = stop - 1 - len(chunk.drafts)
            logit_indices.index_RW[row] = np.minimum(first + np.arange(1 + limits.drafts), stop - 1)
            if chunk.max_sampled:
                logit_indices.slot_R[row] = chunk.request.slot
            if logit_indices.target_T is not None:
                _fill_targets(logit_indices.target_T[here], chunk)
    return batch, logit_indices


def fill_loop(
    output: SchedulerOutput, limits: Limits, rows: int
) -> tuple[decode.DecodeRows, cache.PageTables]:
    """Fill the rows of a decode loop, padded to this many rows per data shard."""
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
        decode_rows.token_R[row] = _get_token(chunk.request, chunk.start)
        decode_rows.position_R[row] = chunk.start
        decode_rows.slot_R[row] = chunk.request.slot
        decode_rows.limit_R[row] = chunk.max_sampled
        stop_ids = chunk.request.stop_ids[:MAX_STOP_IDS]  # the engine checks further ones
        decode_rows.stop_RL[row, : len(stop_ids)] = stop_ids
        _fill_tables(tables, row, chunk)
    return decode_rows, tables


def fill_sampling_metadata(
    output: SchedulerOutput, limits: Limits, rows: int
) -> sampling.SamplingMetadata:
    """Fill the sampling parameters of each row; padding is greedy."""
    size = limits.shards * rows
    metadata = sampling.SamplingMetadata(
        temperature_R=np.zeros(size, np.float32),
        top_k_R=np.zeros(size, np.int32),
        top_p_R=np.ones(size, np.float32),
        min_p_R=np.zeros(size, np.float32),
        seed_R=np.zeros(size, np.uint32),
        seed_high_R=np.zeros(size, np.uint32),
    )
    for row, chunk in enumerate_rows(output, rows):
        params = chunk.request.params
        is_greedy = params.temperature < GREEDY_TEMPERATURE
        metadata.temperature_R[row] = 0 if is_greedy else params.temperature
        metadata.top_k_R[row] = min(max(params.top_k, 0), np.iinfo(np.int32).max)
        metadata.top_p_R[row] = max(params.top_p, np.finfo(np.float32).tiny)
        metadata.min_p_R[row] = params.min_p
        seed_high, metadata.seed_R[row] = divmod(chunk.request.seed % 2**64, 2**32)
        metadata.seed_high_R[row] = seed_high
    return metadata


def fill_logits_processors(
    output: SchedulerOutput, limits: Limits, rows: int, vocab: int
) -> sampling.LogitsProcessors:
    """Fill the logits processors of each row; those of padding change nothing."""
    size = limits.shards * rows
    processors = sampling.LogitsProcessors(
        slot_R=np.full(size, limits.shards * limits.requests, np.int32),
        presence_R=np.zeros(size, np.float32),
        frequency_R=np.zeros(size, np.float32),
        repetition_R=np.ones(size, np.float32),
        bias_token_RL=np.full((size, MAX_BIASES), -1, np.int32),
        bias_RL=np.zeros((size, MAX_BIASES), np.float32),
        first_stop_R=np.zeros(size, np.int32),
        stop_RL=np.full((size, MAX_STOP_IDS), -1, np.int32),
        allowed_RL=np.full((size, -(-vocab // 32)), -1, np.int32),
    )
    for row, chunk in enumerate_rows(output, rows):
        request, params = chunk.request, chunk.request.params
        if params.has_penalties:
            processors.slot_R[row] = request.slot
        processors.presence_R[row] = params.presence_penalty
        processors.frequency_R[row] = params.frequency_penalty
        processors.repetition_R[row] = params.repetition_penalty
        biases = params.logit_bias or {}
        processors.bias_token_RL[row, : len(biases)] = list(biases)
        processors.bias_RL[row, : len(biases)] = list(biases.values())
        matcher = request.constraints.matcher
        if matcher is None:  # a grammar allows the stop ids by itself
            processors.first_stop_R[row] = min(
                request.prompt_length + params.min_tokens, request.max_length
            )
        elif chunk.max_sampled:
            processors.allowed_RL[row] = matcher.mask()
        stop_ids = request.stop_ids[:MAX_STOP_IDS]
        processors.stop_RL[row, : len(stop_ids)] = stop_ids
        for token in find_banned_tokens(request.constraints, request.output):
            processors.allowed_RL[row, token // 32] &= ~np.int32(
                np.uint32(1 << token % 32).view(np.int32)
            )
    return processors


def count_seen(request: Request, vocab: int) -> np.ndarray:
    """Return int32 [V]: token counts of prompt and output, as in `sampling.LogitsProcessors`."""
    seen_V = np.bincount(request.output, minlength=vocab).astype(np.int32)
    seen_V[request.tokens[: request.prompt_length]] += sampling.IN_PROMPT
    return seen_V


def find_banned_tokens(constraints: Constraints, output: list[int]) -> list[int]:
    """Return the tokens that would complete a bad word."""
    return [
        word[-1]
        for word in constraints.bad_words
        if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]
    ]


def enumerate_rows(output: SchedulerOutput, rows: int) -> list[tuple[int, ScheduledChunk]]:
    """Return each scheduled chunk with its row's index over all data shards."""
    return [
        (shard * rows + row, chunk)
        for shard, chunks in enumerate(output.chunks)
        for row, chunk in enumerate(chunks)
    ]


def _get_token(request: Request, position: int) -> int:
    """Return a token; -1 - slot for a pending one, which the device has in its decode state."""
    return request.tokens[position] if position < len(request.tokens) else -1 - request.slot


def _list_tokens(chunk: ScheduledChunk) -> list[int]:
    known = chunk.request.tokens[chunk.start : chunk.stop - len(chunk.drafts)]
    return [*(known or [_get_token(chunk.request, chunk.start)]), *chunk.drafts]


def _fill_features(feature_T: np.ndarray, chunk: ScheduledChunk, features: int) -> None:
    """Fill the indices of a chunk's image tokens into the flattened feature buffer; -1 is text."""
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
    """Fill the prompt token that follows each token, if the request has `prompt_logprobs`."""
    request = chunk.request
    if request.params.prompt_logprobs is None:
        return
    following = request.tokens[chunk.start + 1 : min(chunk.stop + 1, request.prompt_length)]
    target_T[: len(following)] = following


def _make_tables(limits: Limits, rows: int) -> cache.PageTables:
    size, geometry = limits.shards * rows, limits.geometry
    global_pages = geometry.count_global(limits.max_length)
    local_pages = geometry.count_local(limits.max_length)
    return cache.PageTables(
        np.zeros((size, global_pages), np.int32),
        np.zeros((limits.local_groups, size, local_pages), np.int32),
    )


def _fill_tables(tables: cache.PageTables, row: int, chunk: ScheduledChunk) -> None:
    tables.global_RB[row, : len(chunk.request.global_pages)] = chunk.request.global_pages
    for group, pages in enumerate(chunk.local_pages):
        tables.local_GRB[group, row, : len(pages)] = pages
