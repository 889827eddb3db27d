"""How much fits: from what is wanted and the memory there is to limits and shapes. No jax."""

import dataclasses
import math
from collections.abc import Callable

from l4jax.config import Config, TextConfig
from l4jax.engine.config import CapacityError, EngineConfig
from l4jax.engine.scheduler import Limits

TILES_PER_IMAGE = 17  # 16 tiles and the whole image, at most
_LOGITS_AT_ONCE = 6  # arrays, one or two more than sampling holds
_HIDDENS_AT_ONCE = 6  # arrays as wide as gate and up of an expert, 2 bytes each
_COARSE = 64  # requests, from which on there are loops between those in fours ..
_FINE = 32  # .. every so many rows, or a quarter of those where that is more


def choose_page(config: Config, engine_config: EngineConfig) -> int:
    """Positions of a page: as asked, else 128 or what of it divides the attention chunk."""
    chunk = config.text.chunk
    page = engine_config.block_size or math.gcd(chunk, 128)
    if chunk % page:
        raise CapacityError(f"block_size is {page}: it must divide the attention chunk of {chunk}.")
    return page


def plan_limits(
    config: Config, engine_config: EngineConfig, shards: int, page_bytes: int, memory: int
) -> Limits:
    """What the scheduler must keep within.

    Args:
        config: of the model.
        engine_config: the requested sizes.
        shards: data shards; requests and tokens are divided among them.
        page_bytes: bytes of one page id, over all arrays of the pool.
        memory: bytes that the pool of a data shard may take.

    Raises:
        CapacityError: where a request as long as asked for would not fit, and what would.
    """
    text, page = config.text, choose_page(config, engine_config)
    asked, chunk, local_groups = engine_config.max_model_len, text.chunk, text.nope_interval - 1
    if asked is not None and asked > text.max_positions:
        raise CapacityError(f"max_model_len is {asked}, and the model's is {text.max_positions}.")
    wanted = asked or text.max_positions
    requests, tokens = engine_config.divide(shards)

    def count_pages(length: int) -> int:
        return -(-length // page) + local_groups * -(-min(length, chunk) // page)

    # A prompt that crosses boundaries in one step holds the local pages of all its chunks there.
    spare = tokens // chunk * local_groups * (chunk // page)
    pages = min(count_pages(wanted) * requests + spare, memory // page_bytes)
    fits = find_longest(count_pages, pages, wanted)
    if fits < (asked or 2):
        raise CapacityError(
            f"max_model_len {wanted} needs {count_pages(wanted) * page_bytes / 2**30:.2f} GiB "
            f"of page pool, and there are {max(memory, 0) / 2**30:.2f}: give a max_model_len of at "
            f"most {fits}, or raise kv_cache_memory_bytes or gpu_memory_utilization."
        )
    return Limits(
        shards=shards,
        requests=requests,
        pages=pages,
        tokens=tokens,
        rows=requests + tokens // chunk + 1,
        feature_slots=TILES_PER_IMAGE * engine_config.max_images if config.vision else 0,
        page=page,
        chunk=chunk,
        local_groups=local_groups,
        loop_steps=engine_config.loop_steps,
        max_length=fits,
        drafts=engine_config.speculation.num_speculative_tokens if engine_config.speculation else 0,
    )


def find_free_bytes(
    engine_config: EngineConfig, *, limit: int, in_use: int, programs: int, share: float = 1.0
) -> int:
    """Bytes of one accelerator that the page pool may take.

    Args:
        engine_config: its `gpu_memory_utilization` bounds weights and pool, as in vLLM.
        limit: bytes that this process may take.
        in_use: of them, by now.
        programs: of them, to be left for what programs take while they run.
        share: of the accelerator's memory that `limit` is.
    """
    allowed = min(engine_config.gpu_memory_utilization * limit / share, limit - programs)
    return max(0, int(allowed) - in_use)


def count_program_bytes(text: TextConfig, rows: int, tokens: int) -> int:
    """Bytes of a device that a step of so many of its rows and tokens takes beside weights and
    pages, or somewhat more: for sampling, and for the tokens between two products."""
    logits = 4 * rows * text.vocab
    hidden = 2 * tokens * 2 * text.expert_width
    return _LOGITS_AT_ONCE * logits + _HIDDENS_AT_ONCE * hidden


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that are compiled, per data shard: (tokens, rows) of steps, and rows of loops.

    A server begins once it has the first ones. All others waste less, and are compiled while it
    serves: the coarse ones, then what is left; there are those of `between`, loops which spare many
    rows some padding, and which nobody waits for.
    """

    steps: tuple[tuple[int, int], ...]
    loops: tuple[int, ...]
    between: tuple[int, ...] = ()

    @classmethod
    def of(cls, limits: Limits) -> "Buckets":
        """In fours: tokens 16, 64 .. the budget, with rows to match; loops 1, 4, 16 .. all.

        A row of padding costs little beside the weights; a program more takes seconds to compile.
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
        while limits.requests > max(rows, _COARSE):
            between.append(rows)
            rows += max(_FINE, 2 ** (rows.bit_length() - 1) // 4)
        return cls(
            (*steps, (tokens[-1], limits.rows)),
            tuple(loops),
            tuple(rows for rows in between if rows not in loops),
        )

    @property
    def first(self) -> "Buckets":
        """The least and the most, which hold whatever comes."""
        return Buckets(_take_ends(self.steps), _take_ends(self.loops))

    @property
    def coarse(self) -> "Buckets":
        """About every other, the first ones among them."""
        return Buckets(_thin(self.steps), _thin(self.loops))

    def without(self, others: "Buckets") -> "Buckets":
        """All but the steps and loops of others."""
        return Buckets(
            tuple(shape for shape in self.steps if shape not in others.steps),
            tuple(rows for rows in self.loops if rows not in others.loops),
            self.between,
        )

    def fit(
        self,
        tokens: int,
        rows: int,
        has_logits_processors: bool = False,
        *,
        has: Callable[[tuple[int, int]], bool] = lambda shape: True,
    ) -> tuple[int, int]:
        """The smallest step shape that holds as many tokens and rows: a first one, or one that is
        there, as `has` says. Adjusted rows, which are rarer, have the coarse ones alone."""
        others = self.coarse.steps if has_logits_processors else filter(has, self.steps)
        return min((t, r) for t, r in (*self.first.steps, *others) if t >= tokens and r >= rows)

    def fit_loop(
        self,
        rows: int,
        has_logits_processors: bool = False,
        *,
        has: Callable[[int], bool] = lambda rows: True,
    ) -> int:
        """The same of loops."""
        others = (
            self.coarse.loops
            if has_logits_processors
            else filter(has, (*self.loops, *self.between))
        )
        return min(r for r in (*self.first.loops, *others) if r >= rows)


def _take_ends(shapes: tuple) -> tuple:
    return tuple(dict.fromkeys((shapes[0], shapes[-1])))


def _thin(shapes: tuple) -> tuple:
    """The first, and of the others every second up to the last."""
    return shapes[:1] + shapes[1:][::-2][::-1]


def find_longest(count_pages: Callable[[int], int], pages: int, wanted: int) -> int:
    """The longest request, up to `wanted`, whose pages fit; by bisection."""
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_pages(middle) <= pages else (low, middle - 1)
    return low
