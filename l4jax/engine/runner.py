"""The only place that knows devices: weights, pool and features live here, and plans run."""

import contextlib
import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import axes, cache, checkpoint, decode, sampling
from l4jax.config import Config
from l4jax.engine import arrays, calibrate
from l4jax.engine.capacity import (
    Buckets,
    choose_page,
    count_program_bytes,
    find_free_bytes,
    plan_limits,
)
from l4jax.engine.config import EngineConfig
from l4jax.engine.executables import Call, Executables
from l4jax.engine.local_kernels import choose_kernels, make_kernels, name_kernels
from l4jax.engine.request import MAX_LOGPROBS
from l4jax.engine.scheduler import Limits, ScheduledChunk, SchedulerOutput
from l4jax.kernels.formats import FP8, upcast_scales
from l4jax.model import Llama4, VisionTower, declare_parameters
from l4jax.strategies import STRATEGIES, activate, check_mesh
from sharding import Layout, find_gpu_share, make_mesh, prepare_devices

TILES = (1, 4)  # image tiles that are encoded in one call
CPU_POOL_BYTES = 2**28  # where nobody says otherwise: what a laptop can spare


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A plan under way on the devices, and where its results will be."""

    plan: SchedulerOutput
    shape: tuple[int, int]  # tokens and rows, per data shard
    found: Future[tuple[Any, Any]]  # what was drawn, and what was scored where somebody asks

    def land(self) -> list[arrays.SampledTokens]:
        """Wait for it, and read what each request drew; raises what went wrong."""
        tokens, rows = self.shape
        drawn, scored = jax.device_get(self.found.result())
        if self.plan.is_loop:
            return arrays.read_loop(self.plan, drawn, rows)
        return arrays.read_step(self.plan, drawn, scored, tokens, rows)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a plan runs: the key of a compiled program, and what gives its call once all that was
    started before has given the pool back."""

    key: Hashable
    call: Callable[[], Call]


class Runner:
    """A model on a mesh: `load` or `initialize`, `reserve`, then `dispatch` as often as wanted."""

    def __init__(
        self,
        config: Config,
        mesh: str | int,
        dtype: Any,
        strategy: str = "tensor",
        kernels: str = "auto",
    ):
        """Make the mesh; refuse one that the model cannot be cut for (`sharding.MeshError`), and
        kernels that the devices cannot run (ValueError).
        """
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.notice = prepare_devices(mesh)
        self.layout = Layout(make_mesh(mesh), STRATEGIES[strategy])
        check_mesh(config, self.layout)
        device = self.layout.mesh.devices.flat[0]
        self.kernels = name_kernels(kernels, device)
        chosen = choose_kernels(self.kernels, device)
        self.model = Llama4(config.text, make_kernels(chosen, self.layout.local))
        self.tower = VisionTower(config.vision, config.text.width) if config.vision else None
        self.kv_scales: tuple[np.ndarray, np.ndarray] | None = None  # of a checkpoint that has them
        # A program that branches or loops on what it has found keeps the thread that calls it until
        # then, where it is no CUDA graph; so this one calls them all, one after the other, while
        # plans are made for the next.
        self._launcher = ThreadPoolExecutor(1, "launching")
        # On a GPU float32 would be multiplied as TF32, 13 bits shorter; bfloat16 stays as it is.
        self._precision = "highest" if self.dtype == jnp.float32 else "default"

    def load(
        self,
        folder: Path,
        *,
        quantization: str | None = None,
        quantize_attention: bool | None = None,
        lora: Path | None = None,
        progress: bool = True,
    ) -> None:
        """Read the weights, each device its own part; quantized on the way to "fp8" or "int4".

        Attention is quantized by default in fp8, and not in int4. An adapter, in a folder as PEFT
        writes it, is merged before. For kernels that want float32 scales these are made so once.
        """
        self.params = checkpoint.load(
            folder,
            self.config,
            self.dtype,
            self.layout.place,
            online_quantization=checkpoint.OnlineQuantization.choose(
                quantization, quantize_attention
            ),
            lora=checkpoint.read_adapter(lora, self.config) if lora else None,
            progress=progress,
        )
        if self.kernels == "hopper":
            self.params = upcast_scales(self.params)
        self.kv_scales = checkpoint.load_kv_scales(folder, self.config)

    def initialize(
        self,
        seed: int,
        *,
        quantization: str | None = None,
        quantize_attention: bool | None = None,
    ) -> None:
        """Random weights instead, made on the devices: for measuring. Quantized as in `load`."""
        online_quantization = checkpoint.OnlineQuantization.choose(quantization, quantize_attention)
        shapes, names = declare_parameters(self.config, self.dtype)

        # One program a shape, not one for all: a hundred generators in one took minutes to compile.
        @functools.partial(jax.jit, static_argnames=("shape", "place"))
        def draw(salt: Any, shape: tuple[int, ...], place: Any) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), salt)
            values = 0.02 * jax.random.normal(key, shape, self.dtype)
            return jax.lax.with_sharding_constraint(values, place)

        def fill(path: Any, leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> Any:
            salt = np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
            array = draw(salt, leaf.shape, self.layout.place(names))
            inner = online_quantization and online_quantization.count_in_axes(
                "/".join(key.key for key in path)
            )
            if not online_quantization or not inner:
                return array
            return online_quantization.quantize(array, inner, names, self.layout.place)

        self.params = jax.tree_util.tree_map_with_path(fill, shapes, names)

    def reserve(self, engine_config: EngineConfig) -> Limits:
        """Allocate the page pool; how much there is of everything. Raises `CapacityError`."""
        self._drop_pool()
        text, shards = self.config.text, self.layout.count(axes.ROWS)
        page = choose_page(self.config, engine_config)
        dtype = self.dtype if engine_config.kv_cache_dtype == "auto" else FP8
        page_bytes = cache.count_page_bytes(text, page, dtype)
        self._scales = self._find_kv_scales(engine_config, page) if dtype == FP8 else None
        memory = self._find_memory(engine_config)
        self.limits = plan_limits(self.config, engine_config, shards, page_bytes, memory)
        self.buckets = Buckets.of(self.limits)
        self._pool_dtype = dtype
        about = (self.config, self.layout, self.kernels, self.dtype, self._precision)
        devices = list(self.layout.mesh.devices.flat)
        folder = find_executables_folder(devices[0])
        self._executables = Executables(repr(about), devices, self._ready, folder)
        self.start()
        return self.limits

    def start(self) -> None:
        """Begin with an empty pool and an empty memory of requests, the first time or after a
        failure.
        """
        self._drop_pool()  # there may be no room for two
        text, vision, limits = self.config.text, self.config.vision, self.limits
        place = self.layout.place_all
        make_pool = functools.partial(
            cache.make_pool, text, limits.shards * limits.pages, limits.page, self._pool_dtype
        )
        pool_places = place(cache.name_pool_axes(jax.eval_shape(make_pool)))
        self.pool = jax.jit(make_pool, out_shardings=pool_places)()
        if self._scales is not None:
            k_scale, v_scale = self._put(self._scales, ((axes.LAYERS,), (axes.LAYERS,)))
            self.pool = dataclasses.replace(self.pool, k_scale=k_scale, v_scale=v_scale)
        slots, memory_places = limits.shards * limits.requests, place(decode.DECODE_STATE_AXES)
        make_decode_state = functools.partial(decode.make_decode_state, slots, text.vocab)
        self.memory = jax.jit(make_decode_state, out_shardings=memory_places)()
        features_place = place((axes.TILES, axes.FEATURES, axes.WIDTH))
        if limits.feature_slots and vision is not None:
            shape = (limits.feature_slots, vision.features, text.width)
            make_features = functools.partial(jnp.zeros, shape, self.dtype)
            self.features = jax.jit(make_features, out_shardings=features_place)()
        self.programs = decode.make_programs(pool_places, memory_places, features_place)

    def dispatch(self, plan: SchedulerOutput) -> "PendingStep":
        """Start a plan on the devices, behind what was started before it; does not wait."""
        runs = [run for shard in plan.runs for run in shard]
        has_logits_processors = any(run.request.has_logits_processors for run in runs)
        work: list[Callable[[], Any]] = []  # in this order, when it is its turn
        for run in (run for run in runs if run.is_first):
            if run.feature_slots:
                work.append(functools.partial(self._encode, run))
            if run.request.params.has_penalties:
                seen_V = arrays.count_seen(run.request, self.config.text.vocab)
                work.append(functools.partial(self._set_seen, run.request.slot, seen_V))
        with self._ready():
            if plan.is_loop:
                rows = self._find_loop(plan, has_logits_processors)
                shape, program = (rows, rows), self._prepare_loop(plan, rows, has_logits_processors)
                work.append(lambda: (self._run_loop(program), None))
            else:
                shape = self._find_step(plan, has_logits_processors)
                program = self._prepare_step(plan, shape, has_logits_processors)
                is_asked = any(run.request.params.prompt_logprobs is not None for run in runs)
                work.append(lambda: self._run_step(program, is_scored=is_asked))

        def launch() -> tuple[Any, Any]:
            with self._ready():
                return [do() for do in work][-1]

        return PendingStep(plan, shape, self._launcher.submit(launch))

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile what is enough for every plan, several programs at a time, and run each on
        padding. What wastes less, and what adjusted rows need, who are rarer, is compiled while
        others are served.
        """
        empty: list[list[ScheduledChunk]] = [[] for _ in range(self.limits.shards)]
        step, loop = SchedulerOutput(empty, False), SchedulerOutput(empty, True)
        tiles = [] if self.features is None else [(self._blank(count), []) for count in TILES]

        def prepare(
            some: Buckets, has_logits_processors: bool = False
        ) -> tuple[list[Program], list[Program]]:
            loops = *some.loops, *some.between
            return (
                [self._prepare_step(step, shape, has_logits_processors) for shape in some.steps],
                [self._prepare_loop(loop, rows, has_logits_processors) for rows in loops],
            )

        def call(*programs: Program) -> dict[Hashable, Call]:
            return {program.key: program.call() for program in programs}

        first, coarse = self.buckets.first, self.buckets.coarse
        with self._ready():
            steps, loops = prepare(first)
            parts = [self._prepare_tiles(*each) for each in tiles]
            # Of most tokens first, and steps before loops: these compile in less time.
            self._executables.compile(call(*steps[::-1], *parts, *loops), progress=progress)
            self._set_seen(0, np.zeros(self.config.text.vocab, np.int32))
            for program in parts:
                self._run_tiles(program)
            for program in steps:
                self._run_step(program)
            for program in loops:
                self._run_loop(program)
            behind = (
                *prepare(coarse.without(first)),
                *prepare(coarse, True),
                *prepare(self.buckets.without(coarse)),
            )
            self._executables.compile_behind(call(*itertools.chain(*behind)))
        jax.block_until_ready(self.pool)

    @property
    def is_compiling(self) -> bool:
        """Whether programs that the warm-up left are still being compiled."""
        return self._executables.is_compiling

    def wait_for_compilers(self, *, progress: bool = False) -> None:
        """Wait for what the warm-up left to be compiled while others are served."""
        self._executables.wait(progress=progress)

    def _find_step(self, plan: SchedulerOutput, has_logits_processors: bool) -> tuple[int, int]:
        counts = [sum(run.stop - run.start for run in shard) for shard in plan.runs]

        def has(shape: tuple[int, int]) -> bool:
            return self._can_run(_name_step(shape, False))

        return self.buckets.fit(
            max(counts), max(map(len, plan.runs)), has_logits_processors, has=has
        )

    def _find_loop(self, plan: SchedulerOutput, has_logits_processors: bool) -> int:
        def has(rows: int) -> bool:
            key = _name_loop(rows, False)
            # Without a warm-up none of those between is worth being compiled for.
            return (
                self._executables.has(key) if rows in self.buckets.between else self._can_run(key)
            )

        return self.buckets.fit_loop(max(map(len, plan.runs)), has_logits_processors, has=has)

    def _can_run(self, key: Hashable) -> bool:
        """Whether a program is there; where nobody compiled any beforehand, all are."""
        return self._executables.has(key) or not self._executables.knows(key)

    def _prepare_step(
        self, plan: SchedulerOutput, shape: tuple[int, int], has_logits_processors: bool
    ) -> Program:
        tokens, rows = shape
        step = arrays.fill_step(
            plan, self.limits, self.config, tokens, rows, has_targets=has_logits_processors
        )
        arguments = (
            self._put(step.batch, cache.name_axes(has_features=self.features is not None)),
            self._put(step.ends, decode.name_logit_indices_axes(has_targets=has_logits_processors)),
            self._put(step.controls, sampling.SAMPLING_METADATA_AXES),
            self._put_adjustments(plan, rows) if has_logits_processors else None,
        )
        static = {"model": self.model, "logprobs": MAX_LOGPROBS if has_logits_processors else None}
        run = self.programs.step

        def call() -> Call:
            state = (self.params, self.pool, self.memory)
            return Call(run, (*state, *arguments, self.features), static)

        return Program(_name_step(shape, has_logits_processors), call)

    def _run_step(self, program: Program, *, is_scored: bool = False) -> tuple[Any, Any]:
        found = self._executables.run(program.key, program.call())
        self.pool, self.memory, sampled, scored = found
        return sampled, scored if is_scored else None

    def _prepare_loop(
        self, plan: SchedulerOutput, rows: int, has_logits_processors: bool
    ) -> Program:
        state, tables, controls = arrays.fill_loop(plan, self.limits, rows)
        arguments = (
            self._put(state, decode.DECODE_ROWS_AXES),
            self._put(tables, cache.name_axes().tables),
            self._put(controls, sampling.SAMPLING_METADATA_AXES),
            self._put_adjustments(plan, rows) if has_logits_processors else None,
        )
        steps, logprobs = self.limits.loop_steps, MAX_LOGPROBS if has_logits_processors else None
        static = {"model": self.model, "steps": steps, "logprobs": logprobs}
        run = self.programs.decode_loop

        def call() -> Call:
            return Call(run, (self.params, self.pool, self.memory, *arguments), static)

        return Program(_name_loop(rows, has_logits_processors), call)

    def _run_loop(self, program: Program) -> Any:
        found = self._executables.run(program.key, program.call())
        self.pool, self.memory, decoded = found
        return decoded

    def _set_seen(self, slot: int, seen_V: np.ndarray) -> None:
        self.memory = self.programs.set_seen(self.memory, np.int32(slot), seen_V)

    def _encode(self, run: ScheduledChunk) -> None:
        """Encode the tiles of a request into its feature slots."""
        pixels_ICYX = np.concatenate([image.pixels_ICHW for image in run.request.images])
        at = 0
        while at < len(pixels_ICYX):
            count = next((n for n in TILES if n >= len(pixels_ICYX) - at), TILES[-1])
            part = pixels_ICYX[at : at + count]
            padding = ((0, count - len(part)), (0, 0), (0, 0), (0, 0))
            slots = run.feature_slots[at : at + count]
            self._run_tiles(self._prepare_tiles(np.pad(part, padding), slots))
            at += count

    def _prepare_tiles(self, pixels_ICYX: np.ndarray, slots: Sequence[int]) -> Program:
        """Of a few tiles; those beyond the slots are padding."""
        beyond = self.limits.feature_slots
        slot_I = [*slots, *[beyond] * (len(pixels_ICYX) - len(slots))]
        names = (axes.TILES, axes.CHANNELS, axes.PIXELS_Y, axes.PIXELS_X)
        pixels = self._put(pixels_ICYX, names)
        run, static = self.programs.encode_tiles, {"tower": self.tower}

        def call() -> Call:
            arguments = (self.params, self.features, pixels, np.array(slot_I, np.int32))
            return Call(run, arguments, static)

        return Program(("tiles", len(pixels_ICYX)), call)

    def _run_tiles(self, program: Program) -> None:
        self.features = self._executables.run(program.key, program.call())

    def _put_adjustments(self, plan: SchedulerOutput, rows: int) -> sampling.LogitsProcessors:
        found = arrays.fill_logits_processors(plan, self.limits, rows, self.config.text.vocab)
        return self._put(found, sampling.LOGITS_PROCESSORS_AXES)

    def _drop_pool(self) -> None:
        """Free what a pool before took, once all that was dispatched has been started."""
        self._launcher.submit(lambda: None).result()
        self.pool = self.memory = self.features = None

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        with activate(self.layout), jax.default_matmul_precision(self._precision):
            yield

    def _blank(self, tiles: int) -> np.ndarray:
        assert self.config.vision is not None
        c = self.config.vision
        return np.zeros((tiles, c.channels, c.tile, c.tile), np.float32)

    def _find_kv_scales(
        self, engine_config: EngineConfig, page: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The checkpoint's scales of an fp8 cache; else calibrated, if so asked; None is 1."""
        if self.kv_scales is not None or not engine_config.calculate_kv_scales:
            return self.kv_scales
        shards = self.layout.count(axes.ROWS)
        batch = calibrate.make_batch(self.config, page, shards)
        with self._ready():
            largest = calibrate.find_largest(
                self.params,
                self._put(batch, cache.name_axes()),
                model=self.model,
                page=page,
                shards=shards,
                dtype=self.dtype,
            )
        k_largest, v_largest = jax.device_get(largest)
        return calibrate.choose_scales(k_largest), calibrate.choose_scales(v_largest)

    def _put(self, tree: Any, names: Any) -> Any:
        return jax.device_put(tree, self.layout.place_all(names))

    def _find_memory(self, engine_config: EngineConfig) -> int:
        """Bytes that the page pool of one data shard may take, over the devices of the shard."""
        if engine_config.kv_cache_memory_bytes is not None:
            return engine_config.kv_cache_memory_bytes
        device = self.layout.mesh.devices.flat[0]
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return CPU_POOL_BYTES
        share = find_gpu_share() if device.platform == "gpu" else 1.0
        rows, tokens = engine_config.divide(self.layout.count(axes.ROWS))
        programs = count_program_bytes(self.config.text, rows=rows, tokens=tokens)
        free = find_free_bytes(
            engine_config,
            limit=stats["bytes_limit"],
            in_use=stats["bytes_in_use"],
            programs=programs,
            share=share,
        )
        return free * self.layout.count(axes.KV_HEADS)


def _name_step(shape: tuple[int, int], has_logits_processors: bool) -> Hashable:
    return "step", shape, has_logits_processors


def _name_loop(rows: int, has_logits_processors: bool) -> Hashable:
    return "loop", rows, has_logits_processors


def find_executables_folder(device: Any) -> Path | None:
    """Where compiled programs are kept: beside what jax keeps, and only where it keeps anything.

    Those of a GPU alone: a CPU compiles in less time, for the very processor that it has; and those
    of one process.
    """
    settings: Any = jax.config  # whose type knows no settings
    beside = settings.jax_compilation_cache_dir
    if not beside or "://" in beside or not settings.jax_enable_compilation_cache:
        return None
    is_alone = device.platform == "gpu" and jax.process_count() == 1
    return Path(beside) / "executables" if is_alone else None


def keep_compilations(folder: Path) -> None:
    """Keep what is compiled in a folder, for the next start, unless jax knows of one already."""
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("false", "0"):
        return
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
