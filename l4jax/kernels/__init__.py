"""Kernels: each is a definition in `reference.py`, and accelerations with the same signature.

The model receives a frozen bundle of functions; the engine's runner chooses the implementation.
`README.md` says how to read this package, and lists measured dead ends.
"""

import dataclasses
from collections.abc import Callable

from jax import Array

from l4jax.kernels import formats, portable, reference


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernel functions of the model, with the signatures of `reference.py` and `formats.multiply`.

    The default of each field is its definition.
    """

    normalize: Callable[..., Array] = reference.normalize
    embed: Callable[..., Array] = reference.embed
    attend: Callable[..., tuple[Array, Array, Array]] = reference.attend
    # The global layers' attention, where it differs from `attend`: under context parallelism.
    attend_global: Callable[..., tuple[Array, Array, Array]] | None = None
    attend_part: Callable[..., tuple[Array, Array, Array, Array]] = reference.attend_part
    attend_all: Callable[..., Array] = reference.attend_all
    route: Callable[..., tuple[Array, Array, Array]] = reference.route
    run_experts: Callable[..., Array] = reference.run_experts
    mix_experts: Callable[..., Array] = reference.mix_experts
    multiply: Callable[..., Array] = formats.multiply


REFERENCE = Kernels()
PORTABLE = Kernels(attend=portable.attend, attend_part=portable.attend_part)
