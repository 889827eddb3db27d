"""Buckets: the shapes of compiled programs, and which one runs a step. No jax."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from l4jax.engine.scheduler import Limits

_FINE_FROM = 64  # requests of a data shard, above which there are fine loops
_FINE_ROWS = 32  # rows between fine loops, or a quarter of the rows where that is more


class Bucket(NamedTuple):
    """The shape of a program, per data shard. In a loop, tokens equal rows."""

    is_loop: bool
    tokens: int
    rows: int

    @classmethod
    def of_loop(cls, rows: int) -> "Bucket":
        """Return the bucket of a decode loop."""
        return cls(True, rows, rows)

    def fits(self, tokens: int, rows: int) -> bool:
        """Return whether the bucket holds this many tokens and rows."""
        return self.tokens >= tokens and self.rows >= rows


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The buckets of an engine: steps in ascending order, loops in ascending order, fine loops.

    The engine serves once the smallest and the largest of steps and of loops are compiled. The
    others waste less padding, and are compiled while it serves: the coarse ones, then the rest.
    Programs with logits processors, which are rarer, have the coarse buckets only. Fine loops
    save padding of many rows; no step waits for their compilation.
    """

    steps: tuple[Bucket, ...]
    loops: tuple[Bucket, ...]
    fine_loops: tuple[Bucket, ...] = ()

    @classmethod
    def of(cls, limits: Limits) -> "Buckets":
        """Make the buckets by factors of four: 16, 64 .. all tokens; loops of 1, 4, 16 .. all rows.

        A row of padding costs little compared with reading the weights; one more program takes
        seconds to compile.
        """
        tokens, rows = [16], [1]
        while tokens[-1] < limits.tokens:
            tokens.append(min(4 * tokens[-1], limits.tokens))
        while rows[-1] < limits.requests:
            rows.append(min(4 * rows[-1], limits.requests))
        steps = [
            Bucket(False, t, min(limits.requests + t // limits.chunk + 1, limits.rows))
            for t in tokens[:-1]
        ]
        fine: list[int] = []
        count = _FINE_ROWS
        while limits.requests > max(count, _FINE_FROM):
            fine.append(count)
            count += max(_FINE_ROWS, 2 ** (count.bit_length() - 1) // 4)
        return cls(
            (*steps, Bucket(False, tokens[-1], limits.rows)),
            tuple(map(Bucket.of_loop, rows)),
            tuple(Bucket.of_loop(count) for count in fine if count not in rows),
        )

    @property
    def first(self) -> tuple[Bucket, ...]:
        """The smallest and the largest step and loop: together they hold every batch."""
        ends = (self.steps[0], self.steps[-1], self.loops[0], self.loops[-1])
        return tuple(dict.fromkeys(ends))

    @property
    def coarse(self) -> tuple[Bucket, ...]:
        """About every second step and loop, the first ones included."""
        return _thin(self.steps) + _thin(self.loops)

    @property
    def all(self) -> tuple[Bucket, ...]:
        """All steps, loops and fine loops."""
        return self.steps + self.loops + self.fine_loops

    def choose(
        self,
        *,
        is_loop: bool,
        tokens: int,
        rows: int,
        has_logits_processors: bool = False,
        is_ready: Callable[[Bucket], bool] | None = None,
    ) -> Bucket:
        """Return the smallest bucket that fits, among those that may run now.

        Args:
            is_loop: whether a decode loop runs, or a step.
            tokens, rows: of the largest data shard.
            has_logits_processors: allows the coarse buckets, whether or not they are compiled.
            is_ready: whether the program of a bucket is compiled. The first buckets may run before:
                their programs are awaited. None if programs are compiled at their first call;
                then all but the fine loops may run.
        """
        candidates: Iterable[Bucket]
        if has_logits_processors:
            candidates = self.coarse
        elif is_ready is None:
            candidates = self.steps + self.loops
        else:
            candidates = (*self.first, *filter(is_ready, self.all))
        return min(
            bucket
            for bucket in candidates
            if bucket.is_loop == is_loop and bucket.fits(tokens, rows)
        )


def _thin(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    """Return the first bucket, and every second of the others, the last one included."""
    return buckets[:1] + buckets[1:][::-2][::-1]
