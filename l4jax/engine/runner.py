"""The runner: weights, KV cache and programs on a mesh of devices, and the dispatch of steps."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import axes, cache, checkpoint, decode
from l4jax.config import Config
from l4jax.engine import input_batch, kv_cache, output_batch, weights
from l4jax.engine.buckets import Bucket, Buckets
from l4jax.engine.capacity import choose_page, compute_limits
from l4jax.engine.config import EngineConfig
from l4jax.engine.local_kernels import choose_kernels, make_kernels, resolve_kernels
from l4jax.engine.program_cache import Program, ProgramCache, find_program_folder
from l4jax.engine.request import MAX_LOGPROBS
from l4jax.engine.scheduler import Limits, ScheduledChunk, SchedulerOutput
from l4jax.kernels.formats import FP8
from l4jax.model import Llama4, VisionTower
from l4jax.strategies import activate, check_mesh, choose_strategy
from sharding import Layout, make_mesh, prepare_devices

TILES = (1, 4)  # image tiles that are encoded in one call


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A dispatched step or loop, and its results once the devices have computed them."""

    scheduler_output: SchedulerOutput
    bucket: Bucket
    outputs: Future[tuple[Any, Any]]  # sampled tokens; prompt logprobs, if requested

    def result(self) -> list[output_batch.SampledTokens]:
        """Wait for the step, and read each request's results; raises the error of a failed step."""
        _, tokens, rows = self.bucket
        sampled, prompt_logprobs = jax.device_get(self.outputs.result())
        if self.scheduler_output.is_loop:
            return output_batch.read_loop(self.scheduler_output, sampled, rows)
        return output_batch.read_step(self.scheduler_output, sampled, prompt_logprobs, tokens, rows)


class _Batch(NamedTuple):
    """The inputs of a step or a loop on the devices, without the state that it updates."""

    bucket: Bucket
    has_logits_processors: bool
    inputs: tuple[Any, ...]

    @property
    def key(self) -> Hashable:
        """The key of its program."""
        return self.bucket, self.has_logits_processors


class Runner:
    """A model on a mesh: `load` or `initialize` weights, `allocate_kv_cache`, then `dispatch`."""

    def __init__(
        self,
        config: Config,
        mesh: str | int,
        dtype: Any,
        kernels: str = "auto",
        *,
        enable_expert_parallel: bool = False,
    ):
        """Make the mesh and choose the kernels.

        Raises:
            sharding.MeshError: if the mesh does not divide the model.
            ValueError: if the devices do not run these kernels.
        """
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.notice = prepare_devices(mesh)
        rules = choose_strategy(mesh, enable_expert_parallel=enable_expert_parallel)
        self.layout = Layout(make_mesh(mesh), rules)
        check_mesh(config, self.layout)
        device = self.layout.mesh.devices.flat[0]
        self.kernels = resolve_kernels(kernels, device)
        bundle = choose_kernels(self.kernels, device)
        self.model = Llama4(config.text, make_kernels(bundle, self.layout))
        self.tower = VisionTower(config.vision, config.text.width) if config.vision else None
        self.kv_scales: kv_cache.Scales | None = None  # of the checkpoint
        # Without CUDA graphs, a program with a branch or a loop blocks the calling thread until the
        # condition is computed. One thread calls all programs in order, while the next step is
        # scheduled.
        self._launcher = ThreadPoolExecutor(1, "launching")
        # GPUs multiply float32 as TF32 by default, 13 bits less precise; bfloat16 is not affected.
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
        """Load the weights of a checkpoint; see `weights.load_params`."""
        self.params = weights.load_params(
            folder,
            self.config,
            self.dtype,
            self.layout.place,
            quantization=quantization,
            quantize_attention=quantize_attention,
            lora=lora,
            upcasts_scales=self.kernels == "hopper",
            progress=progress,
        )
        self.kv_scales = checkpoint.load_kv_scales(folder, self.config)

    def initialize(
        self,
        seed: int,
        *,
        quantization: str | None = None,
        quantize_attention: bool | None = None,
    ) -> None:
        """Make random weights, for measurements; see `weights.initialize_params`."""
        self.params = weights.initialize_params(
            seed,
            self.config,
            self.dtype,
            self.layout.place,
            quantization=quantization,
            quantize_attention=quantize_attention,
        )

    def allocate_kv_cache(self, engine_config: EngineConfig) -> Limits:
        """Allocate the KV cache, and return all sizes.

        Raises:
            CapacityError: if the sizes do not fit in memory.
        """
        self._free_state()
        stripes = self.layout.count(axes.STRIPES)
        page = choose_page(self.config, engine_config, stripes)
        self._cache_dtype = self.dtype if engine_config.kv_cache_dtype == "auto" else FP8
        self._scales = None
        if self._cache_dtype == FP8:
            self._scales = self._find_scales(page, calibrates=engine_config.calculate_kv_scales)
        self.limits = compute_limits(
            self.config,
            engine_config,
            self.layout.count(axes.ROWS),
            cache.count_page_bytes(self.config.text, page, self._cache_dtype),
            kv_cache.measure_pool_bytes(self.config, engine_config, self.layout),
            stripes,
        )
        self.buckets = Buckets.of(self.limits)
        context = (self.config, self.layout, self.kernels, self.dtype, self._precision)
        devices = list(self.layout.mesh.devices.flat)
        self.programs = ProgramCache(
            repr((*context, self.limits.loop_steps)),
            devices,
            self.activate,
            find_program_folder(devices[0]),
        )
        self.reset_state()
        return self.limits

    def reset_state(self) -> None:
        """Allocate an empty KV cache and decode state, at first or after a failed step."""
        self._free_state()  # two may not fit
        state, shardings = kv_cache.allocate_state(
            self.config,
            self.limits,
            self.layout,
            dtype=self.dtype,
            cache_dtype=self._cache_dtype,
            scales=self._scales,
        )
        self.pool, self.decode_state, self.features = (
            state.pool,
            state.decode_state,
            state.features,
        )
        pool, decode_state, steps = shardings.pool, shardings.decode_state, self.limits.loop_steps
        model: Any = self.model  # to pyright, Linen modules are not hashable
        tower: Any = self.tower
        self.functions: dict[Hashable, Any] = {
            "set_token_counts": decode.jit_set_token_counts(decode_state)
        }
        for has_processors, logprobs in ((False, None), (True, MAX_LOGPROBS)):
            step = decode.jit_step(model, logprobs, self.limits.shards, pool, decode_state)
            loop = decode.jit_decode_loop(model, steps, logprobs, pool, decode_state)
            self.functions |= {("step", has_processors): step, ("loop", has_processors): loop}
        if tower is not None:
            self.functions["tiles"] = decode.jit_encode_tiles(tower, shardings.features)

    def dispatch(self, output: SchedulerOutput) -> PendingStep:
        """Start a step or a loop after all steps before it, without waiting for them."""
        chunks = [chunk for shard in output.chunks for chunk in shard]
        has_processors = any(chunk.request.has_logits_processors for chunk in chunks)
        has_prompt_logprobs = any(
            chunk.request.params.prompt_logprobs is not None for chunk in chunks
        )
        launches: list[Callable[[], Any]] = []  # in this order, on the launcher's thread
        for chunk in (chunk for chunk in chunks if chunk.is_first):
            if chunk.feature_slots:
                launches.append(functools.partial(self._encode_images, chunk))
            if chunk.request.params.has_penalties:
                seen_V = input_batch.count_seen(chunk.request, self.config.text.vocab)
                launches.append(
                    functools.partial(self._set_token_counts, chunk.request.slot, seen_V)
                )
        with self.activate():
            bucket = self._choose_bucket(output, has_processors)
            batch = self._put_batch(output, bucket, has_processors)

        def launch() -> tuple[Any, Any]:
            with self.activate():
                for start in launches:
                    start()
                results = self.programs.run(*self._make_program(batch))
                sampled, prompt_logprobs = self._keep_state(results)
                return sampled, prompt_logprobs if has_prompt_logprobs else None

        return PendingStep(output, bucket, self._launcher.submit(launch))

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile the programs of the first buckets and of image tiles, several at once, and run
        each on padding. The other programs compile in the background while requests run: coarse
        buckets, those with logits processors, then the rest.
        """
        empty: list[list[ScheduledChunk]] = [[] for _ in range(self.limits.shards)]

        def put_all(buckets: Iterable[Bucket], has_processors: bool = False) -> list[_Batch]:
            return [
                self._put_batch(SchedulerOutput(empty, bucket.is_loop), bucket, has_processors)
                for bucket in buckets
            ]

        first, coarse = self.buckets.first, self.buckets.coarse
        with self.activate():
            batches = put_all(first)
            steps = [batch for batch in batches if not batch.bucket.is_loop]
            loops = [batch for batch in batches if batch.bucket.is_loop]
            tiles = [] if self.features is None else [self._put_blank_tiles(n) for n in TILES]
            # Programs that compile longest come first: steps, and of these the largest.
            self.programs.compile(
                [
                    *map(self._make_program, steps[::-1]),
                    *(self._make_tiles_program(*its) for its in tiles),
                    *map(self._make_program, loops),
                ],
                progress=progress,
            )
            self._set_token_counts(0, np.zeros(self.config.text.vocab, np.int32))
            for pixels, slot_I in tiles:
                self._run_tiles(pixels, slot_I)
            for batch in batches:
                self._keep_state(self.programs.run(*self._make_program(batch)))
            rest = (
                *put_all(bucket for bucket in coarse if bucket not in first),
                *put_all(coarse, has_processors=True),
                *put_all(bucket for bucket in self.buckets.all if bucket not in coarse),
            )
            self.programs.compile_in_background([*map(self._make_program, rest)])
        jax.block_until_ready(self.pool)

    @property
    def is_compiling(self) -> bool:
        """True if programs are compiling in the background, after the warm-up."""
        return self.programs.is_compiling

    def wait_for_compilers(self, *, progress: bool = False) -> None:
        """Wait for the programs that compile in the background."""
        self.programs.wait(progress=progress)

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Trace and run under the runner's layout and matmul precision."""
        with activate(self.layout), jax.default_matmul_precision(self._precision):
            yield

    def _choose_bucket(self, output: SchedulerOutput, has_processors: bool) -> Bucket:
        rows = max(map(len, output.chunks))
        tokens = max(sum(chunk.stop - chunk.start for chunk in shard) for shard in output.chunks)

        def is_ready(bucket: Bucket) -> bool:
            return self.programs.is_ready((bucket, has_processors))

        return self.buckets.choose(
            is_loop=output.is_loop,
            tokens=rows if output.is_loop else tokens,
            rows=rows,
            has_logits_processors=has_processors,
            is_ready=None if self.programs.is_empty else is_ready,
        )

    def _put_batch(self, output: SchedulerOutput, bucket: Bucket, has_processors: bool) -> _Batch:
        """Fill the inputs of a step or a loop, and put them on the devices."""
        pairs = input_batch.fill_batch(
            output,
            self.limits,
            self.config,
            bucket.tokens,
            bucket.rows,
            has_logits_processors=has_processors,
        )
        return _Batch(bucket, has_processors, tuple(self._put(*pair) for pair in pairs))

    def _make_program(self, batch: _Batch) -> Program:
        """Return a batch's program with the current state, which the program donates."""
        args = (self.params, self.pool, self.decode_state, *batch.inputs)
        if batch.bucket.is_loop:
            return Program(batch.key, self.functions["loop", batch.has_logits_processors], args)
        step = self.functions["step", batch.has_logits_processors]
        return Program(batch.key, step, (*args, self.features))

    def _keep_state(self, results: tuple[Any, ...]) -> tuple[Any, Any]:
        """Keep a batch's new state; return its sampled tokens, and a step's prompt logprobs."""
        self.pool, self.decode_state, sampled, *prompt_logprobs = results
        return sampled, prompt_logprobs[0] if prompt_logprobs else None

    def _set_token_counts(self, slot: int, seen_V: np.ndarray) -> None:
        self.decode_state = self.functions["set_token_counts"](
            self.decode_state, np.int32(slot), seen_V
        )

    def _encode_images(self, chunk: ScheduledChunk) -> None:
        """Encode the image tiles of a request into its feature slots."""
        pixels_ICYX = np.concatenate([image.pixels_ICHW for image in chunk.request.images])
        start = 0
        while start < len(pixels_ICYX):
            count = next((n for n in TILES if n >= len(pixels_ICYX) - start), TILES[-1])
            part = pixels_ICYX[start : start + count]
            padding = ((0, count - len(part)), (0, 0), (0, 0), (0, 0))
            slots = chunk.feature_slots[start : start + count]
            self._run_tiles(*self._put_tiles(np.pad(part, padding), slots))
            start += count

    def _put_blank_tiles(self, count: int) -> tuple[Any, np.ndarray]:
        assert self.config.vision is not None
        c = self.config.vision
        return self._put_tiles(np.zeros((count, c.channels, c.tile, c.tile), np.float32), [])

    def _put_tiles(self, pixels_ICYX: np.ndarray, slots: Sequence[int]) -> tuple[Any, np.ndarray]:
        """Put pixels on the devices; tiles without a slot are padding."""
        padding = [self.limits.feature_slots] * (len(pixels_ICYX) - len(slots))
        pixels = self._put(pixels_ICYX, (axes.TILES, axes.CHANNELS, axes.PIXELS_Y, axes.PIXELS_X))
        return pixels, np.array([*slots, *padding], np.int32)

    def _make_tiles_program(self, pixels: Any, slot_I: np.ndarray) -> Program:
        args = (self.params, self.features, pixels, slot_I)
        return Program(("tiles", len(slot_I)), self.functions["tiles"], args)

    def _run_tiles(self, pixels: Any, slot_I: np.ndarray) -> None:
        self.features = self.programs.run(*self._make_tiles_program(pixels, slot_I))

    def _find_scales(self, page: int, *, calibrates: bool) -> kv_cache.Scales | None:
        """Return the scales of an fp8 cache: the checkpoint's, else calibrated ones; None is 1."""
        if self.kv_scales is not None or not calibrates:
            return self.kv_scales
        with self.activate():
            return kv_cache.calibrate_scales(
                self.config, self.params, self.model, page, self.layout, self.dtype
            )

    def _free_state(self) -> None:
        """Free the state, once all dispatched steps have been launched."""
        self._launcher.submit(lambda: None).result()
        self.pool = self.decode_state = self.features = None

    def _put(self, tree: Any, names: Any) -> Any:
        return jax.device_put(tree, self.layout.place_all(names))
