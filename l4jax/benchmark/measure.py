"""Running a model of random weights, and the clock beside it."""

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
from l4jax.config import Config
from l4jax.engine.capacity import Capacity, find_longest
from l4jax.engine.engine import Engine
from l4jax.engine.request import SamplingParams
from l4jax.engine.runner import Runner
from l4jax.model import Llama4

_REPEATS = 3  # of each figure, of which the median counts
_PROMPT_STEP = 8192  # tokens of a prompt that run in one step


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what: "decode", "prefill" or "throughput".
        batch: rows, or requests.
        context: tokens of a row before the first step, or of a prompt.
        seconds: of a step, of a prompt, or of it all.
        tokens: that came out of it, or went in where it is a prompt.
        bytes, flops, floor_seconds: what it costs at least; None of a mix, where nobody knows.
    """

    what: str
    batch: int
    context: int
    seconds: float
    tokens: int
    bytes: float | None = None
    flops: float | None = None
    floor_seconds: float | None = None

    @classmethod
    def of(
        cls, what: str, batch: int, context: int, seconds: float, tokens: int, cost: Cost
    ) -> "Figure":
        """A figure beside what it costs at least."""
        flops = sum(cost.flops.values())
        return cls(what, batch, context, seconds, tokens, cost.bytes, flops, cost.seconds)


class Bench:
    """A runner with random weights, and what is measured on it.

    `phases` holds the seconds that the parts of the start took: "load" once; "compile" and
    "warm-up" are added to by each figure.
    """

    def __init__(
        self,
        config: Config,
        *,
        mesh: str = "1",
        dtype: str = "bfloat16",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        kernels: str = "auto",
        seed: int = 0,
    ):
        # Of text alone: no token of a prompt stands for a picture.
        self.config = dataclasses.replace(config, vision=None, patch_id=None)
        self.kv_cache_dtype, self.seed = kv_cache_dtype, seed
        self.phases: dict[str, float] = dict.fromkeys(("load", "compile", "warm-up"), 0.0)
        with self._clock("load"):
            self.runner = Runner(self.config, mesh, dtype, kernels=kernels)
            self.runner.initialize(seed, quantization=quantization)
            jax.block_until_ready(self.runner.params)
        size = 1 if kv_cache_dtype != "auto" else jnp.dtype(dtype).itemsize
        self.format = Format(quantization, quantization == "fp8", size)

    def measure_decode(self, batch: int, context: int | None, steps: int) -> Figure:
        """A decode step of `batch` rows, each behind `context` tokens or, where that is None, as
        many as fit: the mean of `steps` steps that the device runs by itself, greedily."""
        wanted = None if context is None else context + steps
        tables, length = self._reserve(batch, wanted, tokens=batch)
        context = length - steps
        if context < 0:
            raise ValueError(f"--steps {steps}: of {batch} rows no more than {length} tokens fit.")
        at_R = np.arange(batch, dtype=np.int32)
        start = cache.Batch(at_R, np.full(batch, context, np.int32), at_R, tables)
        run = self._compile(_decode, start, model=self.runner.model, steps=steps)
        seconds = self._time(run, start) / steps
        cost = count_step(self.config.text, self.format, [context + 1 + steps // 2] * batch)
        return Figure.of("decode", batch, context, seconds, batch, cost)

    def measure_prefill(self, length: int) -> Figure:
        """A prompt, up to 8192 tokens a step, and the logits of its last token."""
        chunk = self.config.text.chunk
        size = min(length, _PROMPT_STEP, chunk)
        if length % size:
            raise ValueError(f"--prefill {length}: a length beyond {size} is a multiple of it.")
        tables, _ = self._reserve(1, length, tokens=size)
        rng = np.random.default_rng(self.seed)
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
        return Figure.of("prefill", 1, length, seconds, length, cost)

    def measure_throughput(
        self,
        requests: int,
        inputs: range,
        outputs: range,
        *,
        seqs: int,
        tokens: int,
        utilization: float,
    ) -> Figure:
        """Requests of random lengths, all at once, through the engine; a few of them warm up."""
        rng = random.Random(self.seed)
        asked = [(rng.choice(inputs), rng.choice(outputs)) for _ in range(requests)]
        capacity = Capacity(
            max_model_len=inputs[-1] + outputs[-1] + 1,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            kv_cache_dtype=self.kv_cache_dtype,
            gpu_memory_utilization=utilization,
            loop_steps=16,
            enable_prefix_caching=False,  # a second run would find all of the first
        )
        engine = Engine(self.runner, capacity)
        with self._clock("compile"):
            engine.warm_up(progress=True)
        with self._clock("warm-up"):
            self._serve(engine, [(length, min(wanted, 32)) for length, wanted in asked[:32]])
        # Which would take time from the engine's thread; of no start, since others are served.
        self.runner.wait_for_compilers(progress=True)
        started = time.perf_counter()
        out = self._serve(engine, asked)
        seconds = time.perf_counter() - started
        return Figure("throughput", requests, sum(n for n, _ in asked) // requests, seconds, out)

    def _serve(self, engine: Engine, asked: list[tuple[int, int]]) -> int:
        """Run requests to their ends; the tokens that came."""
        rng = np.random.default_rng(self.seed)
        for length, wanted in asked:
            ids = rng.integers(0, self.config.text.vocab, length).tolist()
            engine.add(ids, SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True))
        came = 0
        with tqdm(desc="serving", total=len(asked), unit="request") as bar:
            while engine.has_work:
                updates = engine.step()
                came += sum(len(update.token_ids) for update in updates)
                bar.update(sum(update.finish_reason is not None for update in updates))
        return came

    def _reserve(
        self, rows: int, length: int | None, *, tokens: int
    ) -> tuple[cache.PageTables, int]:
        """A pool of noise for so many rows of a length, or of the longest that fits; their tables,
        and that length."""
        capacity = Capacity(
            max_model_len=length,
            max_num_seqs=rows,
            max_num_batched_tokens=max(tokens, rows),
            kv_cache_dtype=self.kv_cache_dtype,
            gpu_memory_utilization=0.92,
        )
        limits = self.runner.reserve(capacity)
        if length is None:
            length = find_longest(limits.count_pages, limits.pages // rows, limits.max_length)
        whole = -(-length // limits.page)
        local = -(-min(length, limits.chunk) // limits.page)
        each = limits.count_pages(length)
        if limits.pages < rows * each:
            raise ValueError(
                f"{rows} rows with {length} tokens each need {rows * each} pages, and "
                f"{limits.pages} fit: take fewer rows or less context."
            )
        ids_RB = np.arange(rows * each, dtype=np.int32).reshape(rows, each)
        locals_RGB = ids_RB[:, whole:].reshape(rows, limits.local_groups, local)
        self.runner.pool = _fill(self.runner.pool, self.seed)
        local_GRB = np.ascontiguousarray(locals_RGB.swapaxes(0, 1))
        return cache.PageTables(ids_RB[:, :whole], local_GRB), length

    def _compile(self, program: Any, batch: cache.Batch, **static: Any) -> Callable[..., Any]:
        with self.runner.layout.active(), self._clock("compile"):
            lowered = program.lower(self.runner.params, self.runner.pool, batch, **static)
            return lowered.compile()

    def _time(self, run: Callable[..., Any], argument: Any) -> float:
        """The median of a few runs, in seconds, after one that does not count."""
        seconds = []
        argument = jax.block_until_ready(jax.device_put(argument))
        with self.runner.layout.active():
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
    def step(at: Any, carry: Any) -> Any:
        token_R, pool = carry
        position_R = batch.position_T + at
        now = dataclasses.replace(batch, token_T=token_R, position_T=position_R)
        x_RD, pool = decode.forward(model, params, pool, now)
        with jax.named_scope("head"):
            logits_RV = decode.compute_logits(model, params, x_RD)
            return jnp.argmax(logits_RV, axis=-1).astype(jnp.int32), pool

    token_R, pool = lax.fori_loop(0, steps, step, (batch.token_T, pool))
    return pool, token_R


@functools.partial(decode.jit, static_argnames=("model",), donate_argnames="pool")
def _prefill(
    params: Any, pool: cache.PagePool, batch: cache.Batch, *, model: Llama4
) -> tuple[cache.PagePool, jax.Array]:
    x_TD, pool = decode.forward(model, params, pool, batch)
    with jax.named_scope("head"):
        return pool, jnp.argmax(decode.compute_logits(model, params, x_TD[-1:]), axis=-1)


@functools.partial(jax.jit, donate_argnames="pool")
def _fill(pool: cache.PagePool, seed: Any) -> cache.PagePool:
    """Noise in place of zeros, which some devices multiply faster; added, so that it takes their
    place and no other."""
    key = jax.random.key(seed, impl="rbg")

    def draw(at: int, pages: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, at), pages.shape, jnp.bfloat16)
        return (pages.astype(noise.dtype) + noise).astype(pages.dtype)

    return dataclasses.replace(
        pool,
        k=tuple(draw(2 * i, pages) for i, pages in enumerate(pool.k)),
        v=tuple(draw(2 * i + 1, pages) for i, pages in enumerate(pool.v)),
    )
