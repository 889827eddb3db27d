"""The only place that knows devices: weights, pool and features live here, and plans run."""

import dataclasses
import functools
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import axes, cache, checkpoint, decode, sampling
from l4jax.config import Config
from l4jax.engine import arrays
from l4jax.engine.capacity import Buckets, Capacity, choose_page, plan_limits
from l4jax.engine.request import MAX_LOGPROBS, Request, TokenLogprobs
from l4jax.engine.scheduler import Limits, Plan
from l4jax.kernels import PORTABLE, Kernels
from l4jax.kernels.formats import FP8, name_axes
from l4jax.model import Llama4, VisionTower, declare_parameters
from sharding import STRATEGIES, Layout, make_mesh, prepare_devices

# What a request got from a plan: its tokens, and what it asked to know of each.
Chosen = tuple[Request, list[int], list[TokenLogprobs]]

TILES = (1, 4)  # image tiles that are encoded in one call
CPU_POOL_BYTES = 2**28  # where nobody says otherwise: what a laptop can spare


class Runner:
    """A model on a mesh: `load` or `initialize`, then `reserve`, then `run` as often as wanted."""

    def __init__(self, config: Config, mesh: str | int, dtype: Any, strategy: str = "tensor"):
        """Make the mesh; refuse one that the model cannot be cut for (`sharding.MeshError`)."""
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.notice = prepare_devices(mesh)
        self.layout = Layout(make_mesh(mesh), STRATEGIES[strategy])
        check_mesh(config, self.layout)
        self.model = Llama4(config.text, make_kernels(PORTABLE, self.layout))
        self.tower = VisionTower(config.vision, config.text.width) if config.vision else None
        self.features: jax.Array | None = None
        self.kv_scales: tuple[np.ndarray, np.ndarray] | None = None  # of a checkpoint that has them
        # On a GPU float32 would be multiplied as TF32, 13 bits shorter; bfloat16 stays as it is.
        self._precision = "highest" if self.dtype == jnp.float32 else "default"

    def load(
        self,
        folder: Path,
        *,
        quantization: str | None = None,
        quantize_attention: bool | None = None,
        progress: bool = True,
    ) -> None:
        """Read the weights, each device its own part; quantized on the way to "fp8" or "int4".

        Attention is quantized by default in fp8, and not in int4.
        """
        self.params = checkpoint.load(
            folder,
            self.config,
            self.dtype,
            self.layout.place,
            narrowing=checkpoint.Narrowing.choose(quantization, quantize_attention),
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
        """Random weights instead, made on the devices: for measuring. Quantized as in `load`."""
        narrowing = checkpoint.Narrowing.choose(quantization, quantize_attention)
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
            inner = narrowing and narrowing.count_inner("/".join(key.key for key in path))
            if not narrowing or not inner:
                return array
            return narrowing.quantize(array, inner, names, self.layout.place)

        self.params = jax.tree_util.tree_map_with_path(fill, shapes, names)

    def reserve(self, capacity: Capacity) -> Limits:
        """Allocate the page pool; how much there is of everything. Raises `CapacityError`."""
        text, shards = self.config.text, self.layout.count(axes.ROWS)
        page = choose_page(self.config, capacity)
        dtype = self.dtype if capacity.kv_cache_dtype == "auto" else FP8
        page_bytes = cache.count_page_bytes(text, page, dtype)
        memory = self._find_memory(capacity)
        self.limits = plan_limits(self.config, capacity, shards, page_bytes, memory)
        self.buckets = Buckets.of(self.limits)
        self.features = None  # made for these limits, when the first image comes
        pages = shards * self.limits.pages
        make = functools.partial(cache.make_pool, text, pages, page, dtype)
        names = cache.name_pool_axes(jax.eval_shape(make))
        self.pool = jax.jit(make, out_shardings=self.layout.place_all(names))()
        if self.kv_scales is not None and self.pool.k_scale is not None:
            k_scale, v_scale = self._put(self.kv_scales, ((axes.LAYERS,), (axes.LAYERS,)))
            self.pool = dataclasses.replace(self.pool, k_scale=k_scale, v_scale=v_scale)
        return self.limits

    def run(self, plan: Plan) -> list[Chosen]:
        """Run a plan; the tokens that it chose, for the requests that it chose any for."""
        runs = [run for shard in plan.runs for run in shard]
        asked = [n for run in runs if (n := run.request.params.logprobs) is not None]
        logprobs = None if not asked else 0 if max(asked) == 0 else MAX_LOGPROBS
        with self.layout.active(), jax.default_matmul_precision(self._precision):
            if plan.is_loop:
                return self._run_loop(plan, logprobs)
            for run in runs:
                if run.start == 0 and run.request.images:
                    self._encode(run.request)
            return self._run_step(plan, logprobs)

    def _run_step(self, plan: Plan, logprobs: int | None) -> list[Chosen]:
        counts = [sum(run.stop - run.start for run in shard) for shard in plan.runs]
        tokens, rows = self.buckets.fit(max(counts), max(map(len, plan.runs)))
        step = arrays.fill_step(plan, self.limits, self.config, tokens, rows)
        has_features = step.batch.feature_T is not None
        self.pool, sampled = decode.step(
            self.params,
            self.pool,
            self._put(step.batch, cache.name_axes(has_features=has_features)),
            step.last_R,
            self._put(step.controls, sampling.CONTROLS_AXES),
            self.features if has_features else None,
            model=self.model,
            logprobs=logprobs,
        )
        sampled = jax.device_get(sampled)
        found = []
        for row, run in arrays.enumerate_rows(plan, rows):
            run.request.computed = run.stop
            if run.stop == len(run.request.tokens):
                told = arrays.read_logprobs(run, sampled, row)
                found.append((run.request, [int(sampled.token_R[row])], told))
        return found

    def _run_loop(self, plan: Plan, logprobs: int | None) -> list[Chosen]:
        rows = self.buckets.fit_loop(max(map(len, plan.runs)))
        state, tables, controls = arrays.fill_loop(plan, self.limits, rows)
        self.pool, decoded = decode.decode_loop(
            self.params,
            self.pool,
            self._put(state, decode.ROWS_AXES),
            self._put(tables, cache.name_axes().tables),
            self._put(controls, sampling.CONTROLS_AXES),
            model=self.model,
            steps=self.limits.loop_steps,
            logprobs=logprobs,
        )
        decoded = jax.device_get(decoded)
        found = []
        for row, run in arrays.enumerate_rows(plan, rows):
            tokens = [int(token) for token in decoded.token_SR[:, row] if token >= 0]
            run.request.computed += len(tokens)
            steps = [arrays.read_step_of_loop(decoded, at) for at in range(len(tokens))]
            told = [entry for step in steps for entry in arrays.read_logprobs(run, step, row)]
            found.append((run.request, tokens, told))
        return found

    def _encode(self, request: Request) -> None:
        """Encode the tiles of a request into its feature slots."""
        assert self.config.vision is not None and self.tower is not None
        slots, at = self.limits.feature_slots, 0
        if self.features is None:  # not before there is an image: nobody else needs the memory
            shape = (slots, self.config.vision.features, self.config.text.width)
            place = self.layout.place((axes.TILES, axes.FEATURES, axes.WIDTH))
            self.features = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=place)()
        pixels_ICYX = np.concatenate([image.pixels_ICHW for image in request.images])
        while at < len(pixels_ICYX):
            count = next((n for n in TILES if n >= len(pixels_ICYX) - at), TILES[-1])
            part = pixels_ICYX[at : at + count]
            padding = count - len(part)
            slot_I = [*request.feature_slots[at : at + count], *[slots] * padding]
            part = np.pad(part, ((0, padding), (0, 0), (0, 0), (0, 0)))
            self.features = decode.encode_tiles(
                self.params,
                self.features,
                self._put(part, (axes.TILES, axes.CHANNELS, axes.PIXELS_Y, axes.PIXELS_X)),
                np.array(slot_I, np.int32),
                tower=self.tower,
            )
            at += count

    def _put(self, tree: Any, names: Any) -> Any:
        return jax.device_put(tree, self.layout.place_all(names))

    def _find_memory(self, capacity: Capacity) -> int:
        """Bytes that the page pool of one data shard may take, over the devices of the shard."""
        if capacity.kv_cache_memory_bytes is not None:
            return capacity.kv_cache_memory_bytes
        stats = self.layout.mesh.devices.flat[0].memory_stats()
        if not stats or "bytes_limit" not in stats:
            return CPU_POOL_BYTES
        free = capacity.gpu_memory_utilization * stats["bytes_limit"] - stats["bytes_in_use"]
        return int(max(0, free)) * self.layout.count(axes.KV_HEADS)


def make_kernels(kernels: Kernels, layout: Layout) -> Kernels:
    """The kernels, each entered through `shard_map`: on a device's own heads, rows and pages."""
    table, at = (axes.ROWS, axes.TABLE), (axes.TOKENS,)
    q = (axes.TOKENS, axes.KV_HEADS, axes.QUERIES, axes.HEAD_DIM)
    kv, pool = (axes.TOKENS, axes.KV_HEADS, axes.HEAD_DIM), cache.POOL_AXES
    x, gate_up = (axes.TOKENS, axes.WIDTH), (axes.EXPERTS, axes.GATE_UP, axes.HIDDEN, axes.WIDTH)
    down = (axes.EXPERTS, axes.WIDTH, axes.HIDDEN)
    local = layout.local

    def run_experts(x_TD: Any, expert_T: Any, gate_up_EcFD: Any, down_EDF: Any) -> jax.Array:
        ins = (x, at, name_axes(gate_up_EcFD, gate_up), name_axes(down_EDF, down))
        run = local(kernels.run_experts, ins, x, sum_over=axes.HIDDEN)
        return run(x_TD, expert_T, gate_up_EcFD, down_EDF)

    return Kernels(
        store=local(kernels.store, (pool, pool, kv, kv, table, at, at), (pool, pool)),
        attend=local(kernels.attend, (q, pool, pool, table, at, at), q),
        run_experts=run_experts,
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
