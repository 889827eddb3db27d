"""From a plan to the arrays of a step, on the host, and from what comes back to its requests."""

import dataclasses

import numpy as np

from l4jax import cache, decode, sampling
from l4jax.config import Config
from l4jax.engine.request import TokenLogprobs
from l4jax.engine.scheduler import Limits, Plan, Run

STOP_IDS = 16  # of a row, watched for on the device; the engine watches for all


@dataclasses.dataclass(frozen=True)
class Step:
    """What `decode.step` takes, before it is placed."""

    batch: cache.Batch
    last_R: np.ndarray
    controls: sampling.Controls


def fill_step(plan: Plan, limits: Limits, config: Config, tokens: int, rows: int) -> Step:
    """The arrays of a step of so many tokens and rows per data shard; the rest is padding."""
    size = limits.shards * tokens
    batch = cache.Batch(
        token_T=np.zeros(size, np.int32),
        position_T=np.full(size, -1, np.int32),
        row_T=np.zeros(size, np.int32),
        tables=_make_tables(limits, rows),
        feature_T=np.full(size, -1, np.int32),
    )
    last_R = np.zeros(limits.shards * rows, np.int32)
    for shard, runs in enumerate(plan.runs):
        at = shard * tokens
        for row, run in enumerate(runs):
            here = slice(at, at + run.stop - run.start)
            batch.token_T[here] = run.request.tokens[run.start : run.stop]
            batch.position_T[here] = np.arange(run.start, run.stop)
            batch.row_T[here] = row
            batch.feature_T[here] = _find_features(run, config)
            _fill_tables(batch.tables, shard * rows + row, run)
            last_R[shard * rows + row] = here.stop - 1
            at = here.stop
    if (batch.feature_T < 0).all():  # text alone: the program that reads no features
        batch = dataclasses.replace(batch, feature_T=None)
    return Step(batch, last_R, _fill_controls(plan, rows))


def fill_loop(
    plan: Plan, limits: Limits, rows: int
) -> tuple[decode.Rows, cache.Tables, sampling.Controls]:
    """The arrays of a decode loop of `rows` per data shard."""
    size = limits.shards * rows
    found = decode.Rows(
        token_R=np.zeros(size, np.int32),
        position_R=np.full(size, -1, np.int32),
        row_R=np.tile(np.arange(rows, dtype=np.int32), limits.shards),
        limit_R=np.zeros(size, np.int32),
        stop_RL=np.full((size, STOP_IDS), -1, np.int32),
    )
    tables = _make_tables(limits, rows)
    for row, run in enumerate_rows(plan, rows):
        found.token_R[row] = run.request.tokens[run.start]
        found.position_R[row] = run.start
        found.limit_R[row] = plan.count_limit(run, limits)
        stops = run.request.stop_ids[:STOP_IDS]
        found.stop_RL[row, : len(stops)] = stops
        _fill_tables(tables, row, run)
    return found, tables, _fill_controls(plan, rows)


def enumerate_rows(plan: Plan, rows: int) -> list[tuple[int, Run]]:
    """Each run of a plan with its row's number over all data shards."""
    return [
        (shard * rows + row, run)
        for shard, runs in enumerate(plan.runs)
        for row, run in enumerate(runs)
    ]


def read_logprobs(run: Run, sampled: sampling.Sampled, row: int) -> list[TokenLogprobs]:
    """What a request asked to know of the token of a row: nothing, or one entry."""
    count = run.request.params.logprobs
    if count is None or sampled.logprob_R is None:
        return []
    top: dict[int, float] = {}
    if count and sampled.top_token_RL is not None and sampled.top_logprob_RL is not None:
        pairs = zip(sampled.top_token_RL[row], sampled.top_logprob_RL[row], strict=True)
        top = {int(token): float(logprob) for token, logprob in list(pairs)[:count]}
    return [TokenLogprobs(float(sampled.logprob_R[row]), top)]


def read_step_of_loop(decoded: decode.Decoded, step: int) -> sampling.Sampled:
    """One step of a loop's results."""
    fields = (getattr(decoded, field.name) for field in dataclasses.fields(decoded))
    token_R, *rest = (None if array is None else array[step] for array in fields)
    return sampling.Sampled(token_R, *rest)  # type: ignore[arg-type]


def _find_features(run: Run, config: Config) -> np.ndarray | int:
    """Where in the feature buffer, seen flat, the image tokens of a run lie; -1 for text."""
    slots, vision = run.request.feature_slots, config.vision
    if not slots or vision is None:
        return -1
    tokens = np.array(run.request.tokens[: run.stop])
    is_patch = tokens == config.patch_id
    order = np.cumsum(is_patch) - 1  # the n-th image token of the prompt takes the n-th feature
    tile, within = np.divmod(order, vision.features)
    found = np.where(is_patch, np.array(slots)[np.maximum(tile, 0)] * vision.features + within, -1)
    return found[run.start :]


def _make_tables(limits: Limits, rows: int) -> cache.Tables:
    size, page = limits.shards * rows, limits.page
    whole = -(-limits.max_length // page)
    chunk = -(-min(limits.chunk, limits.max_length) // page)
    return cache.Tables(
        np.zeros((size, whole), np.int32), np.zeros((limits.local_groups, size, chunk), np.int32)
    )


def _fill_tables(tables: cache.Tables, row: int, run: Run) -> None:
    tables.whole_RB[row, : len(run.request.whole_pages)] = run.request.whole_pages
    for group, pages in enumerate(run.chunk_pages):
        tables.chunk_GRB[group, row, : len(pages)] = pages


def _fill_controls(plan: Plan, rows: int) -> sampling.Controls:
    size = len(plan.runs) * rows
    controls = sampling.Controls(
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
