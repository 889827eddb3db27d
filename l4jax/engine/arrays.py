"""From a plan to the arrays of a step, on the host, and from what comes back to its requests."""

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
    """What `decode.step` takes, before it is placed."""

    batch: cache.Batch
    ends: decode.LogitIndices
    controls: sampling.SamplingMetadata


@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """What a run brought for its request.

    Attributes:
        token_ids: what it drew, in order.
        logprobs: of each, if asked for.
        prompt_logprobs: from position `prompt_start` of the prompt on, if asked for.
    """

    run: ScheduledChunk
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_start: int = 0


def fill_step(
    plan: SchedulerOutput,
    limits: Limits,
    config: Config,
    tokens: int,
    rows: int,
    *,
    has_targets: bool = False,
) -> Step:
    """The arrays of a step of so many tokens and rows per data shard; the rest is padding."""
    size, slots = limits.shards * tokens, limits.shards * limits.requests
    batch = cache.Batch(
        token_T=np.zeros(size, np.int32),
        position_T=np.full(size, -1, np.int32),
        row_T=np.zeros(size, np.int32),
        tables=_make_tables(limits, rows),
        feature_T=np.full(size, -1, np.int32) if limits.feature_slots else None,
    )
    ends = decode.LogitIndices(
        at_RW=np.zeros((limits.shards * rows, 1 + limits.drafts), np.int32),
        slot_R=np.full(limits.shards * rows, slots, np.int32),
        target_T=np.full(size, -1, np.int32) if has_targets else None,
    )
    for shard, runs in enumerate(plan.runs):
        at = shard * tokens
        for row, run in enumerate(runs):
            here = slice(at, at + run.stop - run.start)
            at, number = here.stop, shard * rows + row
            batch.token_T[here] = _find_tokens(run)
            batch.position_T[here] = np.arange(run.start, run.stop)
            batch.row_T[here] = row
            _fill_tables(batch.tables, number, run)
            if batch.feature_T is not None and config.vision is not None:
                _fill_features(batch.feature_T[here], run, config.vision.features)
            first = at - 1 - len(run.drafts)
            ends.at_RW[number] = np.minimum(first + np.arange(1 + limits.drafts), at - 1)
            if run.draws:
                ends.slot_R[number] = run.request.slot
            if ends.target_T is not None:
                _fill_targets(ends.target_T[here], run)
    return Step(batch, ends, fill_sampling_metadata(plan, limits, rows))


def fill_loop(
    plan: SchedulerOutput, limits: Limits, rows: int
) -> tuple[decode.DecodeRows, cache.PageTables, sampling.SamplingMetadata]:
    """The arrays of a decode loop of `rows` per data shard."""
    size = limits.shards * rows
    found = decode.DecodeRows(
        token_R=np.zeros(size, np.int32),
        position_R=np.full(size, -1, np.int32),
        row_R=np.tile(np.arange(rows, dtype=np.int32), limits.shards),
        slot_R=np.full(size, limits.shards * limits.requests, np.int32),
        limit_R=np.zeros(size, np.int32),
        stop_RL=np.full((size, MAX_STOP_IDS), -1, np.int32),
    )
    tables = _make_tables(limits, rows)
    for row, run in enumerate_rows(plan, rows):
        found.token_R[row] = _find_token(run.request, run.start)
        found.position_R[row] = run.start
        found.slot_R[row] = run.request.slot
        found.limit_R[row] = run.draws
        stops = run.request.stop_ids[:MAX_STOP_IDS]  # the engine watches for all
        found.stop_RL[row, : len(stops)] = stops
        _fill_tables(tables, row, run)
    return found, tables, fill_sampling_metadata(plan, limits, rows)


def fill_sampling_metadata(
    plan: SchedulerOutput, limits: Limits, rows: int
) -> sampling.SamplingMetadata:
    """How each row is sampled; padding is greedy."""
    size = limits.shards * rows
    controls = sampling.SamplingMetadata(
        temperature_R=np.zeros(size, np.float32),
        top_k_R=np.zeros(size, np.int32),
        top_p_R=np.ones(size, np.float32),
        min_p_R=np.zeros(size, np.float32),
        seed_R=np.zeros(size, np.uint32),
    )
    for row, run in enumerate_rows(plan, rows):
        params = run.request.params
        controls.temperature_R[row] = params.temperature
        controls.top_k_R[row] = max(params.top_k, 0)
        controls.top_p_R[row] = params.top_p
        controls.min_p_R[row] = params.min_p
        controls.seed_R[row] = run.request.seed % 2**32
    return controls


def fill_logits_processors(
    plan: SchedulerOutput, limits: Limits, rows: int, vocab: int
) -> sampling.LogitsProcessors:
    """What changes each row's logits; padding changes nothing."""
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
    for row, run in enumerate_rows(plan, rows):
        request, params = run.request, run.request.params
        if params.has_penalties:
            found.slot_R[row] = request.slot
        found.presence_R[row] = params.presence_penalty
        found.frequency_R[row] = params.frequency_penalty
        found.repetition_R[row] = params.repetition_penalty
        biases = params.logit_bias or {}
        found.bias_token_RL[row, : len(biases)] = list(biases)
        found.bias_RL[row, : len(biases)] = list(biases.values())
        matcher = request.constraints.matcher
        if matcher is None:  # a grammar ends where it ends
            found.floor_R[row] = request.prompt_length + params.min_tokens
        elif run.draws:
            found.allowed_RL[row] = matcher.mask()
        stops = request.stop_ids[:MAX_STOP_IDS]
        found.stop_RL[row, : len(stops)] = stops
        for token in find_banned(request.constraints, request.output):
            found.allowed_RL[row, token // 32] &= ~np.int32(
                np.uint32(1 << token % 32).view(np.int32)
            )
    return found


def count_seen(request: Request, vocab: int) -> np.ndarray:
    """int32 [V]: token counts of prompt and answer, as `sampling.LogitsProcessors` reads them."""
    seen_V = np.bincount(request.output, minlength=vocab).astype(np.int32)
    seen_V[request.tokens[: request.prompt_length]] += sampling.IN_PROMPT
    return seen_V


def find_banned(constraints: Constraints, output: list[int]) -> list[int]:
    """The tokens that would complete a word that an answer may not hold."""
    return [
        word[-1]
        for word in constraints.bad_words
        if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]
    ]


def enumerate_rows(plan: SchedulerOutput, rows: int) -> list[tuple[int, ScheduledChunk]]:
    """Each run of a plan with its row's number over all data shards."""
    return [
        (shard * rows + row, run)
        for shard, runs in enumerate(plan.runs)
        for row, run in enumerate(runs)
    ]


def read_step(
    plan: SchedulerOutput, sampled: Any, scored: Any, tokens: int, rows: int
) -> list[SampledTokens]:
    """What each request of a step drew: of what was guessed, as much as proves right, and one."""
    found = []
    width = len(sampled.token_R) // (len(plan.runs) * rows)
    for shard, runs in enumerate(plan.runs):
        at = shard * tokens
        for row, run in enumerate(runs):
            start, at = at, at + run.stop - run.start
            first = (shard * rows + row) * width
            drawn = sampled.token_R[first : first + run.draws].tolist()
            right = _count_right(drawn, run.drafts) if run.draws else 0
            drawn, told = drawn[: right + 1], []
            for place in range(len(drawn)):
                told += _read_logprobs(run.request, sampled, first + place)
            asked = [] if scored is None else _read_prompt(run, scored, slice(start, at))
            if drawn or asked:
                found.append(SampledTokens(run, drawn, told, asked, run.start + 1))
    return found


def read_loop(plan: SchedulerOutput, decoded: Any, rows: int) -> list[SampledTokens]:
    """What each request of a loop drew."""
    found = []
    for row, run in enumerate_rows(plan, rows):
        drawn = [token for token in decoded.token_SR[:, row].tolist() if token >= 0]
        told: list[TokenLogprobs] = []
        for step in range(len(drawn)):
            told += _read_logprobs(run.request, _take_step(decoded, step), row)
        found.append(SampledTokens(run, drawn, told))
    return found


def _find_token(request: Request, at: int) -> int:
    """The token at a position; what only the device knows is named by its slot."""
    return request.tokens[at] if at < len(request.tokens) else -1 - request.slot


def _find_tokens(run: ScheduledChunk) -> list[int]:
    known = run.request.tokens[run.start : run.stop - len(run.drafts)]
    return [*(known or [_find_token(run.request, run.start)]), *run.drafts]


def _fill_features(feature_T: np.ndarray, run: ScheduledChunk, features: int) -> None:
    """Where in the feature buffer, seen flat, the image tokens of a run lie; -1 for text."""
    positions = run.request.patch_positions
    if not run.feature_slots or positions is None:
        return
    # The n-th image token of the prompt takes the n-th feature of its tiles.
    first, last = np.searchsorted(positions, (run.start, run.stop))
    tile, within = np.divmod(np.arange(first, last), features)
    feature_T[positions[first:last] - run.start] = (
        np.array(run.feature_slots, np.int32)[tile] * features + within
    )


def _fill_targets(target_T: np.ndarray, run: ScheduledChunk) -> None:
    """The tokens of the prompt that follow each of a run, where its request asks about them."""
    request = run.request
    if request.params.prompt_logprobs is None:
        return
    following = request.tokens[run.start + 1 : min(run.stop + 1, request.prompt_length)]
    target_T[: len(following)] = following


def _make_tables(limits: Limits, rows: int) -> cache.PageTables:
    size, page = limits.shards * rows, limits.page
    whole = -(-limits.max_length // page)
    chunk = -(-min(limits.chunk, limits.max_length) // page)
    return cache.PageTables(
        np.zeros((size, whole), np.int32), np.zeros((limits.local_groups, size, chunk), np.int32)
    )


def _fill_tables(tables: cache.PageTables, row: int, run: ScheduledChunk) -> None:
    tables.global_RB[row, : len(run.request.global_pages)] = run.request.global_pages
    for group, pages in enumerate(run.local_pages):
        tables.local_GRB[group, row, : len(pages)] = pages


def _count_right(drawn: list[int], drafts: tuple[int, ...]) -> int:
    """How many guesses, from the first on, are what was drawn."""
    right = 0
    while right < len(drafts) and drafts[right] == drawn[right]:
        right += 1
    return right


def _read_logprobs(request: Request, sampled: Any, row: int) -> list[TokenLogprobs]:
    """What a request asked to know of the token of a row: nothing, or one entry."""
    count = request.params.logprobs
    if count is None or sampled.logprob_R is None:
        return []
    top = _read_top(sampled.top_token_RL[row], sampled.top_logprob_RL[row], count)
    return [TokenLogprobs(float(sampled.logprob_R[row]), top)]


def _read_prompt(run: ScheduledChunk, scored: Any, here: slice) -> list[TokenLogprobs]:
    """What a request asked to know of the tokens of its prompt that follow those of a run."""
    count, last = run.request.params.prompt_logprobs, run.request.prompt_length - 1
    if count is None:
        return []
    return [
        TokenLogprobs(
            float(scored.logprob_T[at]),
            _read_top(scored.top_token_TL[at], scored.top_logprob_TL[at], count),
        )
        for at in range(here.start, here.start + max(0, min(run.stop, last) - run.start))
    ]


def _read_top(token_L: np.ndarray, logprob_L: np.ndarray, count: int) -> dict[int, float]:
    return dict(zip(token_L[:count].tolist(), logprob_L[:count].tolist(), strict=True))


def _take_step(decoded: Any, step: int) -> sampling.Sampled:
    """One step of a loop's results."""
    fields = (getattr(decoded, field.name) for field in dataclasses.fields(decoded))
    token_R, *rest = (None if leaf is None else leaf[step] for leaf in fields)
    return sampling.Sampled(token_R, *rest)  # type: ignore[arg-type]
