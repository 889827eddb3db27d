"""Kernels are chosen by device and by jax's version."""

from types import SimpleNamespace

import jax
import pytest

from l4jax.engine.local_kernels import resolve_kernels

HOPPER = SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H200")
BLACKWELL = SimpleNamespace(compute_capability="10.0", device_kind="NVIDIA B200")


@pytest.mark.parametrize(
    ("device", "version", "chosen"),
    [
        (HOPPER, (0, 10, 2), "portable"),
        (HOPPER, (0, 11, 2), "hopper"),
        (HOPPER, (0, 12, 0), "portable"),
        (BLACKWELL, (0, 11, 2), "portable"),
    ],
)
def test_auto_takes_the_hopper_kernels_where_they_lower(monkeypatch, device, version, chosen):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert resolve_kernels("auto", device) == chosen
    assert resolve_kernels("portable", device) == "portable"
    if chosen == "portable":
        with pytest.raises(ValueError, match=r"on an H100 or an H200 with jax 0\.11"):
            resolve_kernels("hopper", device)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'fast': it is 'portable', 'hopper' or 'auto'"):
        resolve_kernels("fast", HOPPER)
