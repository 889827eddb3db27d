"""Sizes of the KV pool and of a step, computed from the requested sizes and the memory. No jax."""

import math

from l4jax.config import Config, TextConfig
from l4jax.engine.config import CapacityError, EngineConfig
from l4jax.engine.page_geometry import PageGeometry
from l4jax.engine.scheduler import Limits

TILES_PER_IMAGE = 17  # 16 tiles and the whole image, at most
_LOGITS_ARRAYS = 6  # alive at once, one or two more than sampling needs
_HIDDEN_ARRAYS = 6  # alive at once, as wide as gate and up of an expert, 2 bytes per number


def choose_page(config: Config, engine_config: EngineConfig, stripes: int = 1) -> int:
    """Return the positions of a page: `block_size`, or 128's common divisor with the chunk.

    A global page has one stripe of this size on each of `stripes` devices, and ends with a chunk.
    """
    chunk = config.text.chunk
    if chunk % stripes:
        raise CapacityError(
            f"{stripes} devices of the seq axis cannot share the attention chunk of {chunk}: "
            "take a divisor of it."
        )
    page = engine_config.block_size or math.gcd(chunk // stripes, 128)
    if chunk % (page * stripes):
        shared = f", and {stripes} pages of it together" if stripes > 1 else ""
        raise CapacityError(
            f"block_size is {page}: it{shared} must divide the attention chunk of {chunk}."
        )
    return page


def compute_limits(
    config: Config,
    engine_config: EngineConfig,
    shards: int,
    page_bytes: int,
    pool_bytes: int,
    stripes: int = 1,
) -> Limits:
    """Compute the sizes that the scheduler keeps within.

    Args:
        config: of the model.
        engine_config: the requested sizes.
        shards: data shards; requests and tokens are divided among them.
        page_bytes: bytes of one page id, over all arrays of the pool.
        pool_bytes: bytes that the pool of a data shard may take, of each stripe.
        stripes: devices that share a global page.

    Raises:
        CapacityError: if a request of `max_model_len` tokens does not fit.
    """
    text, page = config.text, choose_page(config, engine_config, stripes)
    geometry = PageGeometry(page, text.chunk, text.nope_interval - 1, stripes)
    requested = engine_config.max_model_len
    if requested is not None and requested > text.max_positions:
        raise CapacityError(
            f"max_model_len is {requested}, and the model's is {text.max_positions}."
        )
    length = requested or text.max_positions
    requests, tokens = engine_config.divide(shards)
    wanted = geometry.count(length) * requests + geometry.count_prefill_spare(tokens)
    pages = min(wanted, pool_bytes // page_bytes)
    longest = geometry.find_longest(pages, length)
    if longest < (requested or 2):
        raise CapacityError(
            f"max_model_len {length} needs {geometry.count(length) * page_bytes / 2**30:.2f} GiB "
            f"of page pool, and there are {max(pool_bytes, 0) / 2**30:.2f}: give a max_model_len "
            f"of at most {longest}, or raise kv_cache_memory_bytes or gpu_memory_utilization."
        )
    speculation = engine_config.speculation
    return Limits(
        shards=shards,
        requests=requests,
        pages=pages,
        tokens=tokens,
        rows=requests + tokens // geometry.chunk + 1,
        feature_slots=TILES_PER_IMAGE * engine_config.max_images if config.vision else 0,
        page=page,
        chunk=geometry.chunk,
        local_groups=geometry.local_groups,
        loop_steps=engine_config.loop_steps,
        max_length=longest,
        drafts=speculation.num_speculative_tokens if speculation else 0,
        stripes=stripes,
    )


def count_pool_bytes(
    engine_config: EngineConfig,
    *,
    limit: int,
    in_use: int,
    temporaries: int,
    preallocated: float = 1.0,
) -> int:
    """Count the bytes of one accelerator that the page pool may take.

    Args:
        engine_config: its `gpu_memory_utilization` bounds weights and pool, as in vLLM.
        limit: bytes that this process may allocate.
        in_use: bytes that it has allocated, by now.
        temporaries: bytes to leave for running programs.
        preallocated: the share of the accelerator's memory that `limit` is.
    """
    allowed = min(engine_config.gpu_memory_utilization * limit / preallocated, limit - temporaries)
    return max(0, int(allowed) - in_use)


def count_temporary_bytes(text: TextConfig, rows: int, tokens: int) -> int:
    """Bound the bytes that a step takes on a device in addition to weights and pages: logits while
    sampling, and hidden states between two matrix products."""
    logits = 4 * rows * text.vocab
    hidden = 2 * tokens * 2 * text.expert_width
    return _LOGITS_ARRAYS * logits + _HIDDEN_ARRAYS * hidden
