"""Kernels: each is a definition in `reference.py`, and accelerations with the same signature.

The model is handed a frozen bundle and does not know which it got; the engine's runner chooses.
"""

import dataclasses
from collections.abc import Callable

from jax import Array

from l4jax.kernels import formats, portable, reference


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What the model calls for the work worth a kernel, with the signatures of `reference.py` and
    of `formats.multiply`."""

    normalize: Callable[..., Array] = reference.normalize
    attend: Callable[..., tuple[Array, Array, Array]] = reference.attend
    attend_all: Callable[..., Array] = reference.attend_all
    route: Callable[..., tuple[Array, Array, Array]] = reference.route
    run_experts: Callable[..., Array] = reference.run_experts
    mix_experts: Callable[..., Array] = reference.mix_experts
    multiply: Callable[..., Array] = formats.multiply


REFERENCE = Kernels()
PORTABLE = Kernels(attend=portable.attend)
