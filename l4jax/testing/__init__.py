"""Tiny Llama 4 checkpoints in the published layouts, with tokenizer, for tests.

`write_model(folder)` writes a model that any server can load, in BF16 or, with `quantization=`, in
one of `SCHEMES`; it needs no torch. Its parts are `write_tokenizer`, `write_processor_configs`, and
`quantize_tensors` for the weights.
"""

from l4jax.testing.model import (
    SPECIAL_TOKENS,
    make_split_pattern,
    write_model,
    write_processor_configs,
    write_tokenizer,
)
from l4jax.testing.quantized import SCHEMES, ScaleShape, Scheme, quantize_tensors

__all__ = [
    "SCHEMES",
    "SPECIAL_TOKENS",
    "ScaleShape",
    "Scheme",
    "make_split_pattern",
    "quantize_tensors",
    "write_model",
    "write_processor_configs",
    "write_tokenizer",
]
