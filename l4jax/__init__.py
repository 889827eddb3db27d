"""Llama 4 inference and serving in JAX: `from l4jax import LLM, SamplingParams`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4jax.engine.request import SamplingParams, StructuredOutputsParams
    from l4jax.llm import LLM
    from l4jax.outputs import GenerationError

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "GenerationError",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Lazy: `--help` and `__version__` must not import jax.
    if name == "LLM":
        from l4jax.llm import LLM

        return LLM
    if name == "GenerationError":
        from l4jax.outputs import GenerationError

        return GenerationError
    if name in ("SamplingParams", "StructuredOutputsParams"):
        from l4jax.engine import request

        return getattr(request, name)
    raise AttributeError(f"module 'l4jax' has no attribute {name!r}")
