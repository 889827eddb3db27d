"""The runner: the only module that knows devices. Weights, KV cache and features live here."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import axes, cache, checkpoint, decode, sampling
from l4jax.config import Config
from l4jax.engine import calibrate, input_batch
from l4jax.engine.buckets import Buckets, ProgramKey
from l4jax.engine.capacity import (
    choose_page,
    count_program_bytes,
    find_free_bytes,
    plan_limits,
)
from l4jax.engine.config import EngineConfig
from l4jax.engine.local_kernels import choose_kernels, make_kernels, resolve_kernels
from l4jax.engine.program_cache import Call, Program, ProgramCache, find_program_folder
from l4jax.engine.request import MAX_LOGPROBS
from l4jax.engine.scheduler import Limits, ScheduledChunk, SchedulerOutput
from l4jax.kernels.formats import FP8, upcast_scales
from l4jax.model import Llama4, VisionTower, declare_parameters
from l4jax.strategies import STRATEGIES, activate, check_mesh
from sharding import Layout, find_gpu_share, make_mesh, prepare_devices

TILES = (1, 4)  # image tiles of an encoder call
CPU_POOL_BYTES = 2**28  # default size of the KV cache on a CPU: what a laptop can spare


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A step that was dispatched, and its results to come."""

    output: SchedulerOutput
    key: ProgramKey
    results: Future[tuple[Any, Any]]  # sampled tokens; prompt logprobs, where asked for

    def result(self) -> list[input_batch.SampledTokens]:
        """Wait for the step, and read each request's sampled tokens. Raises the step's error."""
        sampled, prompt_logprobs = jax.device_get(self.results.result())
        if self.output.is_loop:
            return input_batch.read_loop(self.output, sampled, *self.key.shape)
        return input_batch.read_step(self.output, sampled, prompt_logprobs, *self.key.shape)


class Runner:
    """A model on a mesh: `load` or `initialize`, then `reserve`, then `dispatch` for each step."""

    def __init__(
        self,
        config: Config,
        mesh: str | int,
        dtype: Any,
        strategy: str = "tensor",
        kernels: str = "auto",
    ):
        """Make the mesh and the model.

        Raises:
            sharding.MeshError: for a mesh that does not divide the model.
            ValueError: for kernels that the devices cannot run.
        """
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.notice = prepare_devices(mesh)
        self.layout = Layout(make_mesh(mesh), STRATEGIES[strategy])
        check_mesh(config, self.layout)
        device = self.layout.mesh.devices.flat[0]
        self.kernels = resolve_kernels(kernels, device)
        chosen = choose_kernels(self.kernels, device)
        self.model = Llama4(config.text, make_kernels(chosen, self.layout.local))
        self.tower = VisionTower(config.vision, config.text.width) if config.vision else None
        self.kv_scales: tuple[np.ndarray, np.ndarray] | None = None  # the checkpoint's
        # A program with loops or branches blocks its calling thread until they are decided, unless
        # it is a CUDA graph. One thread launches all programs in order while the host schedules.
        self._launcher = ThreadPoolExecutor(1, "launching")
        # By default a GPU multiplies float32 as TF32, which has 13 bits less; bfloat16 is the same.
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
        """Read the weights, each device its own shards.

        Args:
            folder: the checkpoint.
            quantization: "fp8" or "int4" quantizes weights while they load.
            quantize_attention: whether to quantize attention's projections; None is yes for fp8, no
                for int4.
            lora: the folder of a PEFT adapter, merged before quantization.
            progress: show a progress bar.
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
        if self.kernels == "hopper":  # its kernels read float32 scales
            self.params = upcast_scales(self.params)
        self.kv_scales = checkpoint.load_kv_scales(folder, self.config)

    def initialize(
        self,
        seed: int,
        *,
        quantization: str | None = None,
        quantize_attention: bool | None = None,
    ) -> None:
        """Make random weights on the devices, for benchmarks; quantized as in `load`."""
        online_quantization = checkpoint.OnlineQuantization.choose(quantization, quantize_attention)
        shapes, names = declare_parameters(self.config, self.dtype)

        # One program for each shape: one with all hundred generators took minutes to compile.
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
        """Allocate the KV cache, and return the limits of the scheduler. Raises `CapacityError`."""
        self._free_cache()
        text, shards = self.config.text, self.layout.count(axes.ROWS)
        page = choose_page(self.config, engine_config)
        dtype = self.dtype if engine_config.kv_cache_dtype == "auto" else FP8
        page_bytes = cache.count_page_bytes(text, page, dtype)
        self._scales = self._find_kv_scales(engine_config, page) if dtype == FP8 else None
        pool_bytes = self._find_pool_bytes(engine_config)
        self.limits = plan_limits(self.config, engine_config, shards, page_bytes, pool_bytes)
        self.buckets = Buckets.of(self.limits)
        self._pool_dtype = dtype
        about = (self.config, self.layout, self.kernels, self.dtype, self._precision)
        devices = list(self.layout.mesh.devices.flat)
        folder = find_program_folder(devices[0])
        self.programs = ProgramCache(repr(about), devices, self._tracing, folder)
        self.start()
        return self.limits

    def start(self) -> None:
        """Allocate an empty KV cache and decode state, at the start or after a failed step."""
        self._free_cache()  # there may be no room for two
        text, vision, limits = self.config.text, self.config.vision, self.limits
        place = self.layout.place_all
        make_pool = functools.partial(
            cache.make_pool, text, limits.shards * limits.pages, limits.page, self._pool_dtype
        )
        pool_shardings = place(cache.name_pool_axes(jax.eval_shape(make_pool)))
        self.pool = jax.jit(make_pool, out_shardings=pool_shardings)()
        if self._scales is not None:
            k_scale, v_scale = self._put(self._scales, ((axes.LAYERS,), (axes.LAYERS,)))
            self.pool = dataclasses.replace(self.pool, k_scale=k_scale, v_scale=v_scale)
        slots, state_shardings = limits.shards * limits.requests, place(decode.DECODE_STATE_AXES)
        make_state = functools.partial(decode.make_decode_state, slots, text.vocab)
        self.state = jax.jit(make_state, out_shardings=state_shardings)()
        features_sharding = place((axes.TILES, axes.FEATURES, axes.WIDTH))
        if limits.feature_slots and vision is not None:
            shape = (limits.feature_slots, vision.features, text.width)
            make_features = functools.partial(jnp.zeros, shape, self.dtype)
            self.features = jax.jit(make_features, out_shardings=features_sharding)()
        self.functions = decode.jit_functions(pool_shardings, state_shardings, features_sharding)

    def dispatch(self, output: SchedulerOutput) -> PendingStep:
        """Start a step after those dispatched before it; does not wait."""
        chunks = [chunk for shard in output.runs for chunk in shard]
        work: list[Callable[[], Any]] = []  # in launch order
        for chunk in (chunk for chunk in chunks if chunk.is_first):
            if chunk.feature_slots:
                work.append(functools.partial(self._encode_images, chunk))
            if chunk.request.params.has_penalties:
                seen_V = input_batch.count_seen(chunk.request, self.config.text.vocab)
                work.append(functools.partial(self._set_counts, chunk.request.slot, seen_V))
        has_targets = any(chunk.request.params.prompt_logprobs is not None for chunk in chunks)
        with self._tracing():
            key = self.buckets.choose(output, self.programs)
            work.append(functools.partial(self._run, key, self._make_inputs(key, output)))

        def launch() -> tuple[Any, Any]:
            with self._tracing():
                sampled, prompt_logprobs = [call() for call in work][-1]
            return sampled, prompt_logprobs if has_targets else None

        return PendingStep(output, key, self._launcher.submit(launch))

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile the programs that hold every step, and run each on padding.

        The other buckets, and the programs with logits processors, compile while the engine serves.
        """
        first, coarse = self.buckets.first, self.buckets.coarse
        tiles = [] if self.features is None else [ProgramKey("encode_tiles", (n,)) for n in TILES]
        steps = [key for key in first.list_keys() if key.kind == "step"]
        loops = [key for key in first.list_keys() if key.kind == "decode_loop"]
        later = (
            *coarse.without(first).list_keys(),
            *coarse.list_keys(has_logits_processors=True),
            *self.buckets.without(coarse).list_keys(),
        )
        with self._tracing():
            # Large steps take longest to compile, loops least: they are lowered in this order.
            order = (*reversed(steps), *tiles, *loops)
            inputs = {key: self._make_padding(key) for key in order}
            calls = {key: self._bind(key, arguments) for key, arguments in inputs.items()}
            self.programs.compile(calls, progress=progress)
            self._set_counts(0, np.zeros(self.config.text.vocab, np.int32))
            for key, arguments in inputs.items():
                self._run(key, arguments)
            self.programs.compile_in_background(
                {key: self._bind(key, self._make_padding(key)) for key in later}
            )
        jax.block_until_ready(self.pool)

    @property
    def is_compiling(self) -> bool:
        """Whether programs are still being compiled in the background."""
        return self.programs.is_compiling

    def wait_for_compilers(self, *, progress: bool = False) -> None:
        """Wait for the programs that compile in the background."""
        self.programs.wait(progress=progress)

    def _make_inputs(self, key: ProgramKey, output: SchedulerOutput) -> tuple[Any, ...]:
        """Make the host's inputs of a step or a decode loop, and put them on the devices."""
        has_processors, rows = key.has_logits_processors, key.shape[-1]
        if key.kind == "step":
            step = input_batch.fill_step(
                output, self.limits, self.config, *key.shape, has_targets=has_processors
            )
            has_features = self.features is not None
            names = (
                cache.name_axes(has_features=has_features),
                decode.name_logit_indices_axes(has_targets=has_processors),
                sampling.SAMPLING_METADATA_AXES,
            )
            parts = (step.batch, step.logit_indices, step.sampling_metadata)
        else:
            parts = input_batch.fill_loop(output, self.limits, rows)
            tables = cache.name_axes().tables
            names = (decode.DECODE_ROWS_AXES, tables, sampling.SAMPLING_METADATA_AXES)
        placed = tuple(self._put(part, name) for part, name in zip(parts, names, strict=True))
        if not has_processors:
            return (*placed, None)
        processors = input_batch.fill_logits_processors(
            output, self.limits, rows, self.config.text.vocab
        )
        return (*placed, self._put(processors, sampling.LOGITS_PROCESSORS_AXES))

    def _make_tile_inputs(self, pixels_ICYX: np.ndarray, slots: Sequence[int]) -> tuple[Any, ...]:
        """Put the pixels of a few tiles on the devices; tiles beyond the slots are padding."""
        out_of_range = self.limits.feature_slots
        slot_I = [*slots, *[out_of_range] * (len(pixels_ICYX) - len(slots))]
        names = (axes.TILES, axes.CHANNELS, axes.PIXELS_Y, axes.PIXELS_X)
        return self._put(pixels_ICYX, names), np.array(slot_I, np.int32)

    def _make_padding(self, key: ProgramKey) -> tuple[Any, ...]:
        """Make the inputs of a program without requests."""
        if key.kind == "encode_tiles":
            assert self.config.vision is not None
            c = self.config.vision
            return self._make_tile_inputs(
                np.zeros((*key.shape, c.channels, c.tile, c.tile), np.float32), ()
            )
        empty: list[list[ScheduledChunk]] = [[] for _ in range(self.limits.shards)]
        return self._make_inputs(key, SchedulerOutput(empty, key.kind == "decode_loop"))

    def _bind(self, key: ProgramKey, inputs: tuple[Any, ...]) -> Call:
        """Return a program and all its arguments: weights, the devices' state, inputs."""
        logprobs = MAX_LOGPROBS if key.has_logits_processors else None
        static: dict[str, Any] = {"model": self.model, "logprobs": logprobs}
        if key.kind == "step":
            arguments = (self.params, self.pool, self.state, *inputs, self.features)
        elif key.kind == "decode_loop":
            arguments = (self.params, self.pool, self.state, *inputs)
            static["steps"] = self.limits.loop_steps
        else:
            arguments, static = (self.params, self.features, *inputs), {"tower": self.tower}
        return Program(self.functions[key.kind], static), arguments

    def _run(self, key: ProgramKey, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """Launch a program, keep the donated state that it returns, and return its results.

        Call it when all earlier launches have returned: each takes the state of the one before.
        """
        result = self.programs.run(key, *self._bind(key, inputs))
        if key.kind == "encode_tiles":
            self.features = result
            return None, None
        self.pool, self.state, sampled, *prompt_logprobs = result
        return sampled, prompt_logprobs[0] if prompt_logprobs else None

    def _set_counts(self, slot: int, seen_V: np.ndarray) -> None:
        """Set the token counts of a request's slot, for its penalties."""
        self.state = self.functions["set_token_counts"](self.state, np.int32(slot), seen_V)

    def _encode_images(self, chunk: ScheduledChunk) -> None:
        """Encode a request's image tiles into its feature slots, a few tiles a call."""
        pixels_ICYX = np.concatenate([image.pixels_ICHW for image in chunk.request.images])
        at = 0
        while at < len(pixels_ICYX):
            count = next((n for n in TILES if n >= len(pixels_ICYX) - at), TILES[-1])
            part = pixels_ICYX[at : at + count]
            padding = ((0, count - len(part)), (0, 0), (0, 0), (0, 0))
            slots = chunk.feature_slots[at : at + count]
            key = ProgramKey("encode_tiles", (count,))
            self._run(key, self._make_tile_inputs(np.pad(part, padding), slots))
            at += count

    def _free_cache(self) -> None:
        """Free the KV cache and the decode state, once all dispatched steps are launched."""
        self._launcher.submit(lambda: None).result()
        self.pool = self.state = self.features = None

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        """The context of every trace and launch: mesh, axis rules, matmul precision."""
        with activate(self.layout), jax.default_matmul_precision(self._precision):
            yield

    def _find_kv_scales(
        self, engine_config: EngineConfig, page: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the scales of an fp8 KV cache: the checkpoint's, or calibrated ones; None is 1."""
        if self.kv_scales is not None or not engine_config.calculate_kv_scales:
            return self.kv_scales
        shards = self.layout.count(axes.ROWS)
        batch = calibrate.make_batch(self.config, page, shards)
        with self._tracing():
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

    def _find_pool_bytes(self, engine_config: EngineConfig) -> int:
        """Return the bytes of one data shard's page pool, over the devices of the shard."""
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
