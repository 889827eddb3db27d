"""How much fits: from what is wanted and the memory there is to limits and shapes. No jax."""

import math
from collections.abc import Callable

from l4jax.config import Config, TextConfig
from l4jax.engine.config import CapacityError, EngineConfig
from l4jax.engine.scheduler import Limits

TILES_PER_IMAGE = 17  # 16 tiles and the whole image, at most
_LOGITS_AT_ONCE = 6  # arrays, one or two more than sampling holds
_HIDDENS_AT_ONCE = 6  # arrays as wide as gate and up of an expert, 2 bytes each


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


def find_longest(count_pages: Callable[[int], int], pages: int, wanted: int) -> int:
    """The longest request, up to `wanted`, whose pages fit; by bisection."""
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_pages(middle) <= pages else (low, middle - 1)
    return low
