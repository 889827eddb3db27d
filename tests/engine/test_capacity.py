"""The page pool's share of an accelerator's memory."""

import pytest

from l4jax.config import SCOUT
from l4jax.engine.capacity import count_pool_bytes, count_temporary_bytes
from l4jax.engine.config import EngineConfig


@pytest.mark.parametrize(
    ("utilization", "share", "in_use", "free"),  # temporaries take 30 bytes
    [
        (0.9, 0.95, 400, 500),  # of the device's 1000 bytes, not of the 950 that jax preallocates
        (0.9, 1.0, 400, 455),  # jax preallocates the whole device
        (0.97, 0.95, 400, 520),  # temporaries are left free
        (0.5, 0.95, 400, 100),
        (0.5, 0.95, 600, 0),
    ],
)
def test_utilization_is_a_share_of_the_whole_accelerator(utilization, share, in_use, free):
    engine_config = EngineConfig(gpu_memory_utilization=utilization)
    assert (
        count_pool_bytes(
            engine_config, limit=950, in_use=in_use, temporaries=30, preallocated=share
        )
        == free
    )


def test_the_bound_of_temporaries_covers_what_the_compiler_allocates():
    """For Scout the compiler reports 991 MiB for 256 rows of 2048 tokens with logits processors,
    and 602 MiB for a prompt of 8192 tokens."""
    assert count_temporary_bytes(SCOUT.text, rows=256, tokens=2048) > 991 * 2**20
    assert count_temporary_bytes(SCOUT.text, rows=1, tokens=8192) > 602 * 2**20
