"""Tiny Llama 4 checkpoints in the published layouts, tokenizer and all: for tests.

`write_model(folder)` makes one that anything that serves can load, in BF16 or, with
`quantization=`, in any of the formats of `FORMS`, and needs no torch. Its parts are
`write_tokenizer`, `write_processor_configs`, and `quantize_tensors` for the weights.
"""

from l4jax.testing.model import (
    SPECIAL_TOKENS,
    make_split_pattern,
    write_model,
    write_processor_configs,
    write_tokenizer,
)
from l4jax.testing.quantized import FORMS, Form, ScaleShape, quantize_tensors

__all__ = [
    "FORMS",
    "SPECIAL_TOKENS",
    "Form",
    "ScaleShape",
    "quantize_tensors",
    "make_split_pattern",
    "write_model",
    "write_processor_configs",
    "write_tokenizer",
]
