"""Time steps, prompts and requests on a model of random weights."""

import dataclasses
import functools
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from l4jax import cache, decode
from l4jax.benchmark.cost import Cost, Format, count_step
from l4jax.benchmark.report import Figure
from l4jax.config import Config
from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.request import SamplingParams
from l4jax.engine.runner import Runner
from l4jax.model import Llama4
from l4jax.strategies import activate

_REPEATS = 3  # timed runs of each figure; the median counts
_PROMPT_STEP = 8192  # tokens of a prompt in one step


class Bench:
    """A runner with random weights, and measurements on it.

    `phases` holds the seconds of the parts of the start: "load" once; each figure adds to "compile"
    and "warm-up".
    """

    def __init__(self, config: Config, engine_config: EngineConfig):
        # Text only: no token of a prompt stands for an image.
        self.config = dataclasses.replace(config, vision=None, patch_id=None)
        self.engine_config = engine_config
        self.phases: dict[str, float] = dict.fromkeys(("load", "compile", "warm-up"), 0.0)
        dtype = "bfloat16" if engine_config.dtype == "auto" else engine_config.dtype
        quantization = engine_config.quantization
        quantizes_attention = engine_config.quantize_attention
        if quantizes_attention is None:
            quantizes_attention = quantization == "fp8"
        with self._clock("load"):
            kernels, mesh = engine_config.kernels, engine_config.mesh_shape
            self.runner = Runner(
                self.config,
                mesh,
                dtype,
                kernels=kernels,
                enable_expert_parallel=engine_config.enable_expert_parallel,
            )
            self.runner.initialize(
                engine_config.seed,
                quantization=quantization,
                quantize_attention=engine_config.quantize_attention,
            )
            jax.block_until_ready(self.runner.params)
        size = 1 if engine_config.kv_cache_dtype != "auto" else jnp.dtype(dtype).itemsize
        self.format = Format(quantization, quantizes_attention, size)

    def measure_decode(self, batch: int, context: int | None, steps: int) -> Figure:
        """Time a greedy decode step of `batch` rows: the mean of `steps` steps in a device loop.

        Each row has `context` tokens of context; None is as many as fit.
        """
        wanted = None if context is None else context + steps
        tables, length = self._reserve(batch, wanted, tokens=batch)
        context = length - steps
        if context < 0:
            raise ValueError(f"--steps {steps}: {batch} rows fit with {length} tokens at most.")
        at_R = np.arange(batch, dtype=np.int32)
        start = cache.Batch(at_R, np.full(batch, context, np.int32), at_R, tables)
        run = self._compile(_decode, start, model=self.runner.model, steps=steps)
        seconds = self._time(run, start) / steps
        cost = count_step(self.config.text, self.format, [context + 1 + steps // 2] * batch)
        return Figure.with_cost("decode", batch, context, seconds, batch, cost)

    def measure_prefill(self, length: int) -> Figure:
        """Time a prompt, up to 8192 tokens a step, and the logits of its last token."""
        chunk = self.config.text.chunk
        size = min(length, _PROMPT_STEP, chunk)
        if length % size:
            raise ValueError(f"--prefill {length}: a length beyond {size} is a multiple of it.")
        tables, _ = self._reserve(1, length, tokens=size)
        rng = np.random.default_rng(self.engine_config.seed)
        token = rng.integers(0, self.config.text.vocab, length).astype(np.int32)
        parts = [
            cache.Batch(
                token[at : at + size],
                np.arange(at, at + size, dtype=np.int32),
                np.zeros(size, np.int32),
                tables,
            )
            for at in range(0, length, size)
        ]
        step = self._compile(_prefill, parts[0], model=self.runner.model)

        def run(params: Any, pool: Any, parts: Any) -> Any:
            last = None
            for part in parts:
                pool, last = step(params, pool, part)
            return pool, last

        seconds = self._time(run, parts)
        costs = [
            count_step(self.config.text, self.format, [at + size], size)
            for at in range(0, length, size)
        ]
        flops = {how: sum(c.flops[how] for c in costs) for how in costs[0].flops}
        cost = Cost(sum(c.bytes for c in costs), flops)
        return Figure.with_cost("prefill", 1, length, seconds, length, cost)

    def measure_throughput(self, requests: int, inputs: range, outputs: range) -> Figure:
        """Time requests of random lengths, submitted at once to an engine, after a warm-up.

        Args:
            requests: how many.
            inputs: lengths of prompts, drawn uniformly, in tokens.
            outputs: lengths of outputs, likewise.
        """
        rng = random.Random(self.engine_config.seed)
        lengths = [(rng.choice(inputs), rng.choice(outputs)) for _ in range(requests)]
        engine_config = dataclasses.replace(
            self.engine_config,
            max_model_len=inputs[-1] + outputs[-1] + 1,
            loop_steps=16,
            enable_prefix_caching=False,  # a repeated run would find every prompt cached
        )
        engine = Engine(self.runner, engine_config)
        with self._clock("compile"):
            engine.warm_up(progress=True)
        with self._clock("warm-up"):
            self._serve(engine, [(length, min(output, 32)) for length, output in lengths[:32]])
        # Background compilation would slow the engine's thread. It is not part of the start: a
        # server serves meanwhile.
        self.runner.wait_for_compilers(progress=True)
        started = time.perf_counter()
        tokens = self._serve(engine, lengths)
        seconds = time.perf_counter() - started
        mean_input = sum(length for length, _ in lengths) // requests
        return Figure("throughput", requests, mean_input, seconds, tokens)

    def _serve(self, engine: Engine, lengths: list[tuple[int, int]]) -> int:
        """Run requests of (input, output) lengths to their ends; return the output tokens."""
        rng = np.random.default_rng(self.engine_config.seed)
        for length, output in lengths:
            ids = rng.integers(0, self.config.text.vocab, length).tolist()
            engine.add(ids, SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True))
        tokens = 0
        with tqdm(desc="serving", total=len(lengths), unit="request") as bar:
            while engine.has_work:
                updates = engine.step()
                tokens += sum(len(update.token_ids) for update in updates)
                bar.update(sum(update.finish_reason is not None for update in updates))
        return tokens

    def _reserve(
        self, rows: int, length: int | None, *, tokens: int
    ) -> tuple[cache.PageTables, int]:
        """Reserve a pool of noise for rows of a length; None is the longest that fits.

        Returns the page tables and the length.
        """
        engine_config = dataclasses.replace(
            self.engine_config,
            max_model_len=length,
            max_num_seqs=rows,
            max_num_batched_tokens=max(tokens, rows),
            gpu_memory_utilization=0.92,
        )
        limits = self.runner.allocate_kv_cache(engine_config)
        geometry = limits.geometry
        if length is None:
            length = geometry.find_longest(limits.pages // rows, limits.max_length)
        global_pages = geometry.count_global(length)
        local_pages = geometry.count_local(length)
        each = geometry.count(length)
        if limits.pages < rows * each:
            raise ValueError(
                f"{rows} rows with {length} tokens each need {rows * each} pages, and "
                f"{limits.pages} fit: take fewer rows or less context."
            )
        ids_RB = np.arange(rows * each, dtype=np.int32).reshape(rows, each)
        locals_RGB = ids_RB[:, global_pages:].reshape(rows, limits.local_groups, local_pages)
        self.runner.pool = _fill(self.runner.pool, self.engine_config.seed)
        local_GRB = np.ascontiguousarray(locals_RGB.swapaxes(0, 1))
        return cache.PageTables(ids_RB[:, :global_pages], local_GRB), length

    def _compile(self, program: Any, batch: cache.Batch, **static: Any) -> Callable[..., Any]:
        with activate(self.runner.layout), self._clock("compile"):
            lowered = program.lower(self.runner.params, self.runner.pool, batch, **static)
            return lowered.compile()

    def _time(self, run: Callable[..., Any], argument: Any) -> float:
        """Return the median seconds of a few runs, after a warm-up run."""
        seconds = []
        argument = jax.block_until_ready(jax.device_put(argument))
        with activate(self.runner.layout):
            for repeat in range(_REPEATS + 1):
                started = time.perf_counter()
                self.runner.pool, result = run(self.runner.params, self.runner.pool, argument)
                jax.block_until_ready((self.runner.pool, result))
                seconds.append(time.perf_counter() - started)
                if repeat == 0:
                    self.phases["warm-up"] += seconds.pop()
        return sorted(seconds)[_REPEATS // 2]

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.phases[phase] += seconds
        tqdm.write(f"{phase} {seconds:.1f} s", file=sys.stderr)


@functools.partial(decode.jit, static_argnames=("model", "steps"), donate_argnames="pool")
def _decode(
    params: Any, pool: cache.PagePool, batch: cache.Batch, *, model: Llama4, steps: int
) -> tuple[cache.PagePool, jax.Array]:
    apply = decode.bind(model, params)

    def step(at: Any, carry: Any) -> Any:
        token_R, pool = carry
        position_R = batch.position_T + at
        now = dataclasses.replace(batch, token_T=token_R, position_T=position_R)
        x_RD, pool = apply(now, pool)
        with jax.named_scope("head"):
            logits_RV = apply(x_RD, method="compute_logits")
            return jnp.argmax(logits_RV, axis=-1).astype(jnp.int32), pool

    token_R, pool = lax.fori_loop(0, steps, step, (batch.token_T, pool))
    return pool, token_R


@functools.partial(decode.jit, static_argnames=("model",), donate_argnames="pool")
def _prefill(
    params: Any, pool: cache.PagePool, batch: cache.Batch, *, model: Llama4
) -> tuple[cache.PagePool, jax.Array]:
    apply = decode.bind(model, params)
    x_TD, pool = apply(batch, pool)
    with jax.named_scope("head"):
        return pool, jnp.argmax(apply(x_TD[-1:], method="compute_logits"), axis=-1)


@functools.partial(jax.jit, donate_argnames="pool")
def _fill(pool: cache.PagePool, seed: Any) -> cache.PagePool:
    """Add noise to a pool of zeros, which some devices multiply faster.

    Adding keeps the donated buffers.
    """
    key = jax.random.key(seed, impl="rbg")

    def draw(at: int, pages: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, at), pages.shape, jnp.bfloat16)
        return (pages.astype(noise.dtype) + noise).astype(pages.dtype)

    return dataclasses.replace(
        pool,
        k=tuple(draw(2 * i, pages) for i, pages in enumerate(pool.k)),
        v=tuple(draw(2 * i + 1, pages) for i, pages in enumerate(pool.v)),
    )
