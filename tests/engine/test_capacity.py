"""How much of an accelerator the page pool may take."""

import pytest

from l4jax.config import SCOUT
from l4jax.engine.capacity import count_program_bytes, find_free_bytes
from l4jax.engine.config import EngineConfig


@pytest.mark.parametrize(
    ("utilization", "share", "in_use", "free"),  # of which programs take 30
    [
        (0.9, 0.95, 400, 500),  # of the 1000 bytes that the device has, not of jax's 950
        (0.9, 1.0, 400, 455),  # where jax has the whole device
        (0.97, 0.95, 400, 520),  # no more than programs leave of what jax has
        (0.5, 0.95, 400, 100),
        (0.5, 0.95, 600, 0),
    ],
)
def test_utilization_is_a_share_of_the_whole_accelerator(utilization, share, in_use, free):
    engine_config = EngineConfig(gpu_memory_utilization=utilization)
    assert (
        find_free_bytes(engine_config, limit=950, in_use=in_use, programs=30, share=share) == free
    )


def test_programs_are_left_what_sampling_and_prompts_take():
    """Of Scout the compiler says, in MiB: 991 for 256 adjusted rows of 2048 tokens; 602 for a
    prompt of 8192."""
    assert count_program_bytes(SCOUT.text, rows=256, tokens=2048) > 991 * 2**20
    assert count_program_bytes(SCOUT.text, rows=1, tokens=8192) > 602 * 2**20
