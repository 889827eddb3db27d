"""How much of an accelerator the page pool may take."""

import pytest

from l4jax.engine.capacity import Capacity, find_free_bytes


@pytest.mark.parametrize(
    ("utilization", "share", "in_use", "free"),
    [
        (0.9, 0.95, 400, 500),  # of the 1000 bytes that the device has, not of jax's 950
        (0.9, 1.0, 400, 455),  # where jax has the whole device
        (0.97, 0.95, 400, 550),  # no more than jax has
        (0.5, 0.95, 400, 100),
        (0.5, 0.95, 600, 0),
    ],
)
def test_utilization_is_a_share_of_the_whole_accelerator(utilization, share, in_use, free):
    capacity = Capacity(gpu_memory_utilization=utilization)
    assert find_free_bytes(capacity, limit=950, in_use=in_use, share=share) == free
