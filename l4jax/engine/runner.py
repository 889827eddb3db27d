"""The only place that knows devices: it places weights, pool and features, and runs what the scheduler plans."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import axes, cache, checkpoint, decode, sampling
from l4jax.config import Config
from l4jax.engine.request import MAX_LOGPROBS, Request, TokenLogprobs
from l4jax.engine.scheduler import Limits, Plan, Run
from l4jax.kernels import PORTABLE, Kernels
from l4jax.model import Llama4, VisionTower, declare_parameters
from sharding import STRATEGIES, Layout, make_mesh, prepare_devices

STOP_IDS = 16  # per request, on the device; more of them are watched for on the host
TILES = (1, 4)  # image tiles encoded in one call


class CapacityError(ValueError):
    """What was asked for does not fit in memory, said in one sentence."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What the engine is built for; names as in vLLM where the thing is the same. None is: choose.

    Attributes:
        max_model_len: tokens of prompt and output of a request, at most.
        max_num_seqs: requests that run together, over all data shards.
        max_num_batched_tokens: tokens of a step, over all data shards.
        block_size: positions of a page.
        kv_cache_memory_bytes: for the page pool, over all devices of a data shard.
        gpu_memory_utilization: share of an accelerator's memory that weights and pool may take.
        max_images: images of a prompt, at most.
        loop_steps: decode steps between two looks at the tokens.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    block_size: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_images: int = 10
    loop_steps: int = 8


class Runner:
    """A model on a mesh. `load` comes first, then `reserve`, then `run` as often as wanted."""

    def __init__(self, config: Config, mesh: str | int, dtype: Any, strategy: str = "tensor"):
        """Make the mesh, and refuse one that the model cannot be cut for (`sharding.MeshError`)."""
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.notice = prepare_devices(mesh)
        self.layout = Layout(make_mesh(mesh), STRATEGIES[strategy])
        check_mesh(config, self.layout)
        self.model = Llama4(config.text, make_kernels(PORTABLE, self.layout))
        self.tower = VisionTower(config.vision, config.text.width) if config.vision else None
        # TF32 would cost float32 its last 13 bits on a GPU; bfloat16 is left alone by this.
        self._precision = "highest" if self.dtype == jnp.float32 else "default"

    def load(self, folder: Path, *, progress: bool = True) -> None:
        """Read the weights, each device its own part."""
        place = self.layout.place
        self.params = checkpoint.load(folder, self.config, self.dtype, place, progress=progress)

    def initialize(self, seed: int) -> None:
        """Random weights instead, made on the devices: for benchmarks and tests (`--load-format dummy`)."""
        shapes, names = declare_parameters(self.config, self.dtype)

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()))
            return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

        place = self.layout.place_all(names)
        self.params = jax.jit(lambda: jax.tree_util.tree_map_with_path(draw, shapes), out_shardings=place)()

    def reserve(self, capacity: Capacity) -> Limits:
        """Allocate the page pool. Raises `CapacityError` where not even one request would fit."""
        text, shards = self.config.text, self.layout.count(axes.ROWS)
        page = capacity.block_size or int(np.gcd(text.chunk, 128))
        if text.chunk % page:
            raise CapacityError(f"block_size is {page}: it must divide the attention chunk of {text.chunk}.")
        page_bytes = cache.count_page_bytes(text, page, self.dtype)
        requests = -(-capacity.max_num_seqs // shards)
        wanted = min(capacity.max_model_len or text.max_positions, text.max_positions)
        if capacity.max_model_len and capacity.max_model_len > text.max_positions:
            raise CapacityError(
                f"max_model_len is {capacity.max_model_len}, and the model's is {text.max_positions}."
            )
        local_groups = text.nope_interval - 1

        def count_pages(length: int) -> int:
            return -(-length // page) + local_groups * -(-min(length, text.chunk) // page)

        most = count_pages(wanted) * requests
        pages = min(most, self._find_memory(capacity) // page_bytes)
        fits = _find_longest(count_pages, pages, wanted)
        if fits < min(wanted, capacity.max_model_len or page):
            raise CapacityError(
                f"max_model_len {wanted} needs {count_pages(wanted) * page_bytes / 2**30:.2f} GiB of page pool "
                f"and there are {pages * page_bytes / 2**30:.2f}: give a max_model_len of at most {fits}, or "
                f"raise kv_cache_memory_bytes or gpu_memory_utilization."
            )
        tokens = max(-(-capacity.max_num_batched_tokens // shards), requests)
        vision = self.config.vision
        self.limits = Limits(
            shards=shards,
            requests=requests,
            pages=pages,
            tokens=tokens,
            rows=requests + tokens // text.chunk + 1,
            # 16 tiles and the whole image, of each image that one prompt may hold.
            feature_slots=17 * capacity.max_images if vision else 0,
            page=page,
            chunk=text.chunk,
            local_groups=local_groups,
            loop_steps=capacity.loop_steps,
            max_length=fits,
        )
        self.buckets = make_buckets(self.limits)
        make = functools.partial(cache.make_pool, text, pages * shards, page, self.dtype)
        place = self.layout.place(cache.POOL_AXES)
        self.pool = jax.jit(make, out_shardings=place)()
        self.features: jax.Array | None = None
        return self.limits

    def run(self, plan: Plan) -> list[tuple[Request, list[int], list[TokenLogprobs]]]:
        """Run a plan and return the tokens that it chose for each request, with what was asked about them."""
        wanted = [run.request.params.logprobs for runs in plan.runs for run in runs]
        asked = [n for n in wanted if n is not None]
        logprobs = None if not asked else 0 if max(asked) == 0 else MAX_LOGPROBS
        with self.layout.active(), jax.default_matmul_precision(self._precision):
            if plan.is_loop:
                return self._run_loop(plan, logprobs)
            for runs in plan.runs:
                for run in runs:
                    if run.start == 0 and run.request.images:
                        self._encode(run.request)
            return self._run_step(plan, logprobs)

    def _run_step(self, plan: Plan, logprobs: int | None) -> list:
        tokens = max(sum(run.stop - run.start for run in runs) for runs in plan.runs)
        T, R = self.buckets.fit(tokens, max(map(len, plan.runs)))
        arrays = _StepArrays(self.limits, T, R)
        for shard, runs in enumerate(plan.runs):
            for row, run in enumerate(runs):
                arrays.add(shard, row, run, self.config)
        batch = jax.device_put(arrays.make_batch(), self._place_batch)
        controls = jax.device_put(_make_controls(plan, R), self._place_controls)
        has_image = any(run.request.feature_slots for runs in plan.runs for run in runs)
        if has_image:
            feature_T = jax.device_put(arrays.feature_T, self.layout.place((axes.TOKENS,)))
            batch = dataclasses.replace(batch, feature_T=feature_T)
        self.pool, sampled = decode.step(
            self.params,
            self.pool,
            batch,
            arrays.last_R,
            controls,
            self.features if has_image else None,
            model=self.model,
            logprobs=logprobs,
        )
        host = jax.device_get(sampled)
        found = []
        for row, run in _enumerate_rows(plan, R):
            run.request.computed = run.stop
            if run.stop == len(run.request.tokens):
                found.append((run.request, [int(host.token_R[row])], _read_logprobs(run, host, row)))
        return found

    def _run_loop(self, plan: Plan, logprobs: int | None) -> list:
        R = self.buckets.fit_loop(max(map(len, plan.runs)))
        shards = self.limits.shards
        rows = decode.Rows(
            token_R=np.zeros(shards * R, np.int32),
            position_R=np.full(shards * R, -1, np.int32),
            row_R=np.tile(np.arange(R, dtype=np.int32), shards),
            limit_R=np.zeros(shards * R, np.int32),
            stop_RL=np.full((shards * R, STOP_IDS), -1, np.int32),
        )  # type: ignore[arg-type]
        tables = _make_tables(self.limits, R)
        for row, run in _enumerate_rows(plan, R):
            rows.token_R[row] = run.request.tokens[run.start]
            rows.position_R[row] = run.start
            rows.limit_R[row] = plan.count_limit(run, self.limits)
            stops = run.request.stop_ids[:STOP_IDS]
            rows.stop_RL[row, : len(stops)] = stops
            _fill_tables(tables, row, run)
        self.pool, decoded = decode.decode_loop(
            self.params,
            self.pool,
            jax.device_put(rows, self.layout.place_all(decode.ROWS_AXES)),
            jax.device_put(tables, self._place_batch.tables),
            jax.device_put(_make_controls(plan, R), self._place_controls),
            model=self.model,
            steps=self.limits.loop_steps,
            logprobs=logprobs,
        )
        host = jax.device_get(decoded)
        found = []
        for row, run in _enumerate_rows(plan, R):
            tokens = [int(token) for token in host.token_SR[:, row] if token >= 0]
            run.request.computed += len(tokens)
            told = [
                logprob for at in range(len(tokens)) for logprob in _read_logprobs(run, _at(host, at), row)
            ]
            found.append((run.request, tokens, told))
        return found

    def _encode(self, request: Request) -> None:
        """Encode the tiles of a request into its feature slots."""
        vision = self.config.vision
        assert vision is not None and self.tower is not None
        slots = self.limits.feature_slots
        if self.features is None:
            shape = (slots, vision.features, self.config.text.width)
            place = self.layout.place((axes.TILES, axes.FEATURES, axes.WIDTH))
            self.features = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=place)()
        pixels_ICYX = np.concatenate([image.pixels_ICHW for image in request.images])
        place = self.layout.place((axes.TILES, axes.PIXELS, axes.PIXELS, axes.PIXELS))
        at = 0
        while at < len(pixels_ICYX):
            count = next((n for n in TILES if n >= len(pixels_ICYX) - at), TILES[-1])
            part = pixels_ICYX[at : at + count]
            padding = count - len(part)
            slot_I = np.array([*request.feature_slots[at : at + count], *[slots] * padding], np.int32)
            part = np.pad(part, ((0, padding), (0, 0), (0, 0), (0, 0)))
            self.features = decode.encode_tiles(
                self.params, self.features, jax.device_put(part, place), slot_I, tower=self.tower
            )
            at += count

    def _find_memory(self, capacity: Capacity) -> int:
        """Bytes that the page pool of one data shard may take, over the devices of the shard."""
        if capacity.kv_cache_memory_bytes is not None:
            return capacity.kv_cache_memory_bytes
        device = self.layout.mesh.devices.flat[0]
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return 2**30  # a CPU: what a laptop can spare; kv_cache_memory_bytes asks for more
        free = capacity.gpu_memory_utilization * stats["bytes_limit"] - stats["bytes_in_use"]
        return int(max(0, free)) * self.layout.count(axes.KV_HEADS)

    @functools.cached_property
    def _place_batch(self) -> cache.Batch:
        return self.layout.place_all(cache.BATCH_AXES)

    @functools.cached_property
    def _place_controls(self) -> sampling.Controls:
        return self.layout.place_all(sampling.CONTROLS_AXES)


def keep_compilations(folder: Path) -> None:
    """Keep what is compiled in a folder, for the next start, unless jax is told of a place already."""
    if jax.config.jax_compilation_cache_dir or os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == "false":
        return
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def make_kernels(kernels: Kernels, layout: Layout) -> Kernels:
    """The kernels, each entered through `shard_map`: a device works on its own heads, rows and pages."""
    table, at = (axes.ROWS, axes.TABLE), (axes.TOKENS,)
    q = (axes.TOKENS, axes.KV_HEADS, axes.QUERIES, axes.HEAD_DIM)
    kv, pool = (axes.TOKENS, axes.KV_HEADS, axes.HEAD_DIM), cache.POOL_AXES
    x, gate_up = (axes.TOKENS, axes.WIDTH), (axes.EXPERTS, axes.GATE_UP, axes.HIDDEN, axes.WIDTH)
    down = (axes.EXPERTS, axes.WIDTH, axes.HIDDEN)
    local = layout.local
    return Kernels(
        store=local(kernels.store, (pool, pool, kv, kv, table, at, at), (pool, pool)),
        attend=local(kernels.attend, (q, pool, pool, table, at, at), q),
        run_experts=local(kernels.run_experts, (x, at, gate_up, down), x, sum_over=axes.HIDDEN),
    )


def check_mesh(config: Config, layout: Layout) -> None:
    """Refuse a mesh that cannot cut the model evenly (`sharding.MeshError`)."""
    text, vision = config.text, config.vision
    layout.check(axes.KV_HEADS, text.kv_heads, "kv heads")
    layout.check(axes.VOCAB, text.vocab, "words of the vocabulary")
    layout.check(axes.HIDDEN, text.expert_width, "columns of an expert")
    if text.moe_interval > 1:
        layout.check(axes.HIDDEN, text.dense_width, "columns of a dense layer")
    if vision is not None:
        layout.check(axes.VISION_HEADS, vision.heads, "vision heads")
        layout.check(axes.VISION_HIDDEN, vision.hidden, "columns of a vision layer")
        layout.check(axes.ADAPTER_HIDDEN, vision.adapter_width, "columns of the vision adapter")


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that are compiled, per data shard: (tokens, rows) of steps, and rows of loops."""

    steps: tuple[tuple[int, int], ...]
    loops: tuple[int, ...]

    def fit(self, tokens: int, rows: int) -> tuple[int, int]:
        """The smallest step shape that holds as many tokens and rows."""
        return next((t, r) for t, r in self.steps if t >= tokens and r >= rows)

    def fit_loop(self, rows: int) -> int:
        """The smallest loop shape that holds as many rows."""
        return next(r for r in self.loops if r >= rows)


def make_buckets(limits: Limits) -> Buckets:
    """Tokens in fours: 16, 64, 256 .. the step's budget; rows to match. Loops in twos: 1, 2, 4 .. all requests."""
    tokens = [16]
    while tokens[-1] < limits.tokens:
        tokens.append(4 * tokens[-1])
    steps = [(t, limits.requests + t // limits.chunk + 1) for t in tokens[:-1]]
    loops = [1]
    while loops[-1] < limits.requests:
        loops.append(2 * loops[-1])
    last = max(limits.tokens, 16)
    return Buckets((*steps, (last, max(limits.rows, limits.requests + last // limits.chunk + 1))), tuple(loops))


class _StepArrays:
    """The arrays of a step, filled row by row on the host."""

    def __init__(self, limits: Limits, T: int, R: int):
        self.limits, self.T, self.R = limits, T, R
        size = limits.shards * T
        self.token_T = np.zeros(size, np.int32)
        self.position_T = np.full(size, -1, np.int32)
        self.row_T = np.zeros(size, np.int32)
        self.feature_T = np.full(size, -1, np.int32)
        self.last_R = np.zeros(limits.shards * R, np.int32)
        self.tables = _make_tables(limits, R)
        self._filled = [0] * limits.shards

    def add(self, shard: int, row: int, run: Run, config: Config) -> None:
        at = shard * self.T + self._filled[shard]
        here = slice(at, at + run.stop - run.start)
        self._filled[shard] += run.stop - run.start
        tokens = run.request.tokens[run.start : run.stop]
        self.token_T[here] = tokens
        self.position_T[here] = np.arange(run.start, run.stop)
        self.row_T[here] = row
        self.last_R[shard * self.R + row] = here.stop - 1
        _fill_tables(self.tables, shard * self.R + row, run)
        if run.request.feature_slots and config.vision is not None:
            before = run.request.tokens[: run.start].count(config.patch_id)
            is_patch_T = np.array(tokens) == config.patch_id
            slots = np.repeat(run.request.feature_slots, config.vision.features) * config.vision.features
            slots += np.tile(np.arange(config.vision.features), len(run.request.feature_slots))
            order_T = before + np.cumsum(is_patch_T) - 1
            self.feature_T[here][is_patch_T] = slots[order_T[is_patch_T]]

    def make_batch(self) -> cache.Batch:
        return cache.Batch(self.token_T, self.position_T, self.row_T, self.tables)  # type: ignore[arg-type]


def _make_tables(limits: Limits, R: int) -> cache.Tables:
    rows, page = limits.shards * R, limits.page
    whole, chunk = -(-limits.max_length // page), -(-min(limits.chunk, limits.max_length) // page)
    return cache.Tables(
        np.zeros((rows, whole), np.int32),
        np.zeros((limits.local_groups, rows, chunk), np.int32),
    )  # type: ignore[arg-type]


def _fill_tables(tables: cache.Tables, row: int, run: Run) -> None:
    tables.whole_RB[row, : len(run.request.whole_pages)] = run.request.whole_pages  # type: ignore[index]
    for group, pages in enumerate(run.chunk_pages):
        tables.chunk_GRB[group, row, : len(pages)] = pages  # type: ignore[index]


def _make_controls(plan: Plan, R: int) -> sampling.Controls:
    rows = len(plan.runs) * R
    controls = sampling.Controls(
        temperature_R=np.zeros(rows, np.float32),
        top_k_R=np.zeros(rows, np.int32),
        top_p_R=np.ones(rows, np.float32),
        min_p_R=np.zeros(rows, np.float32),
        seed_R=np.zeros(rows, np.uint32),
    )  # type: ignore[arg-type]
    for row, run in _enumerate_rows(plan, R):
        params = run.request.params
        controls.temperature_R[row] = params.temperature
        controls.top_k_R[row] = max(params.top_k, 0)
        controls.top_p_R[row] = params.top_p
        controls.min_p_R[row] = params.min_p
        controls.seed_R[row] = run.request.seed % 2**32
    return controls


def _enumerate_rows(plan: Plan, R: int) -> list[tuple[int, Run]]:
    """Each run with its row's number over all data shards."""
    return [(shard * R + row, run) for shard, runs in enumerate(plan.runs) for row, run in enumerate(runs)]


def _read_logprobs(run: Run, host: sampling.Sampled, row: int) -> list[TokenLogprobs]:
    """What a request asked to know of the token of a row: nothing, or one entry."""
    count = run.request.params.logprobs
    if count is None or host.logprob_R is None:
        return []
    top: dict[int, float] = {}
    if count and host.top_token_RL is not None and host.top_logprob_RL is not None:
        pairs = zip(host.top_token_RL[row, :count], host.top_logprob_RL[row, :count], strict=True)
        top = {int(token): float(logprob) for token, logprob in pairs}
    return [TokenLogprobs(float(host.logprob_R[row]), top)]


def _at(host: decode.Decoded, step: int) -> sampling.Sampled:
    """One step of a loop's results."""
    return sampling.Sampled(
        *(None if array is None else array[step] for array in dataclasses.astuple(host))  # type: ignore[arg-type]
    )


def _find_longest(count_pages: Callable[[int], int], pages: int, wanted: int) -> int:
    """The longest request, up to `wanted`, whose pages fit; by bisection."""
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_pages(middle) <= pages else (low, middle - 1)
    return low
