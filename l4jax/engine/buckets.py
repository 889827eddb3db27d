"""Buckets: the shapes that are compiled, and the bucket that runs a scheduler output. No jax.

A step is padded to a bucket. A server starts once the smallest and the largest buckets are
compiled, which hold every step. The other buckets compile while it serves, and run once they are
ready.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

from l4jax.engine.scheduler import Limits, SchedulerOutput

# Decode loops between the coarse buckets, for engines of more than _MANY requests: one every
# _FINE rows, or every quarter of the largest power of two below where that is more.
_MANY = 64  # requests
_FINE = 32  # rows


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """The identity of a compiled program within a runner.

    Attributes:
        kind: "step", "decode_loop" or "encode_tiles".
        shape: (tokens, rows) of a step, (rows,) of a loop, (tiles,) of an encoder call; tokens and
            rows count per data shard.
        has_logits_processors: the program applies logits processors and returns logprobs.
    """

    kind: str
    shape: tuple[int, ...]
    has_logits_processors: bool = False


class Programs(Protocol):
    """The readiness of programs, as `program_cache.ProgramCache` tells it."""

    def is_ready(self, key: ProgramKey) -> bool:
        """Return whether a program is compiled."""
        ...

    def is_known(self, key: ProgramKey) -> bool:
        """Return whether a program is compiled, or is scheduled to be."""
        ...


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Compiled shapes per data shard: (tokens, rows) of steps, and rows of decode loops.

    Attributes:
        steps: (tokens, rows), ascending.
        loops: rows, ascending.
        between: rows of further loops, which spare padding in engines of many requests. A step
            never waits for them.
    """

    steps: tuple[tuple[int, int], ...]
    loops: tuple[int, ...]
    between: tuple[int, ...] = ()

    @classmethod
    def of(cls, limits: Limits) -> "Buckets":
        """Return the buckets of an engine: tokens 16, 64, ... up to the budget, with rows to match;
        loops 1, 4, 16, ... up to all requests.

        A factor of four bounds the number of programs: a row of padding costs little next to
        reading the weights, and each program takes seconds to compile.
        """
        tokens, loops = [16], [1]
        while tokens[-1] < limits.tokens:
            tokens.append(min(4 * tokens[-1], limits.tokens))
        while loops[-1] < limits.requests:
            loops.append(min(4 * loops[-1], limits.requests))
        steps = [
            (t, min(limits.requests + t // limits.chunk + 1, limits.rows)) for t in tokens[:-1]
        ]
        between, rows = [], _FINE
        while limits.requests > max(rows, _MANY):
            between.append(rows)
            rows += max(_FINE, 2 ** (rows.bit_length() - 1) // 4)
        return cls(
            (*steps, (tokens[-1], limits.rows)),
            tuple(loops),
            tuple(rows for rows in between if rows not in loops),
        )

    @property
    def first(self) -> "Buckets":
        """The smallest and the largest buckets, which together hold every step."""
        return Buckets(_take_ends(self.steps), _take_ends(self.loops))

    @property
    def coarse(self) -> "Buckets":
        """About every other bucket, the first ones included."""
        return Buckets(_thin(self.steps), _thin(self.loops))

    def without(self, others: "Buckets") -> "Buckets":
        """Return these buckets less the steps and loops of others."""
        return Buckets(
            tuple(shape for shape in self.steps if shape not in others.steps),
            tuple(rows for rows in self.loops if rows not in others.loops),
            self.between,
        )

    def list_keys(self, has_logits_processors: bool = False) -> Iterator[ProgramKey]:
        """Yield the key of each bucket's program: steps, then loops, in ascending order."""
        for shape in self.steps:
            yield ProgramKey("step", shape, has_logits_processors)
        for rows in (*self.loops, *self.between):
            yield ProgramKey("decode_loop", (rows,), has_logits_processors)

    def fit(
        self,
        tokens: int,
        rows: int,
        has_logits_processors: bool = False,
        *,
        has: Callable[[tuple[int, int]], bool] = lambda shape: True,
    ) -> tuple[int, int]:
        """Return the smallest step bucket that holds these tokens and rows.

        Candidates are the first buckets, and those that `has` reports as ready. With logits
        processors, which are rarer, they are the coarse buckets.
        """
        others = self.coarse.steps if has_logits_processors else filter(has, self.steps)
        return min((t, r) for t, r in (*self.first.steps, *others) if t >= tokens and r >= rows)

    def fit_loop(
        self,
        rows: int,
        has_logits_processors: bool = False,
        *,
        has: Callable[[int], bool] = lambda rows: True,
    ) -> int:
        """Return the smallest loop bucket that holds these rows; candidates as for `fit`."""
        others = (
            self.coarse.loops
            if has_logits_processors
            else filter(has, (*self.loops, *self.between))
        )
        return min(r for r in (*self.first.loops, *others) if r >= rows)

    def choose(self, output: SchedulerOutput, programs: Programs) -> ProgramKey:
        """Return the key of the program that runs a scheduler output.

        Without a warm-up no program is known, and each bucket compiles when it first runs; loops of
        `between` are not worth that.
        """
        chunks = [chunk for shard in output.runs for chunk in shard]
        has_processors = any(chunk.request.has_logits_processors for chunk in chunks)
        rows = max(map(len, output.runs))

        def can_run(key: ProgramKey) -> bool:
            return programs.is_ready(key) or not programs.is_known(key)

        if output.is_loop:

            def has_loop(count: int) -> bool:
                key = ProgramKey("decode_loop", (count,))
                return programs.is_ready(key) if count in self.between else can_run(key)

            found = self.fit_loop(rows, has_processors, has=has_loop)
            return ProgramKey("decode_loop", (found,), has_processors)
        tokens = max(sum(chunk.stop - chunk.start for chunk in shard) for shard in output.runs)
        shape = self.fit(
            tokens, rows, has_processors, has=lambda shape: can_run(ProgramKey("step", shape))
        )
        return ProgramKey("step", shape, has_processors)


def _take_ends(shapes: tuple) -> tuple:
    return tuple(dict.fromkeys((shapes[0], shapes[-1])))


def _thin(shapes: tuple) -> tuple:
    """Return the first shape, and every second of the rest up to the last."""
    return shapes[:1] + shapes[1:][::-2][::-1]
