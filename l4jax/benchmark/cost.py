"""The least bytes and arithmetic of a step, counted from a config. No jax.

Counted is what no implementation avoids: weights of the selected experts once per step, the head,
and the keys and values in view. Activations count as staying on the chip.
"""

import dataclasses

from l4jax.config import INT4_GROUP, TextConfig

# The best that any kernel reached on one NVIDIA H200: bytes a second, FLOP a second.
MEMORY = 4.3e12
ARITHMETIC = {"bfloat16": 790e12, "fp8": 1465e12}


@dataclasses.dataclass(frozen=True)
class Format:
    """Storage of weights and cache. Names are those of `--quantization`; None is bfloat16."""

    quantization: str | None
    attention: bool  # quantized, too
    cache_bytes: int = 2  # per cached number

    def count_bytes(self, numbers: float, *, is_attention: bool = False) -> float:
        """Count the bytes of `numbers` weights of a linear layer, with their scales."""
        if self.quantization is None or (is_attention and not self.attention):
            return 2 * numbers
        return numbers if self.quantization == "fp8" else numbers * (0.5 + 4 / INT4_GROUP)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes and FLOP of a step or of a prompt."""

    bytes: float
    flops: dict[str, float]  # by arithmetic: "fp8", "bfloat16"

    @property
    def seconds(self) -> float:
        """The floor: the longer of moving and computing."""
        return max(self.bytes / MEMORY, sum(n / ARITHMETIC[how] for how, n in self.flops.items()))


def count_experts(experts: int, tokens: int) -> float:
    """Count the distinct experts that `tokens` tokens select, on average, with uniform routing."""
    return experts * (1 - (1 - 1 / experts) ** tokens)


def count_step(config: TextConfig, form: Format, contexts: list[int], tokens: int = 1) -> Cost:
    """Count the cost of a step of one row per context, each row with its last `tokens` tokens.

    Args:
        config: of the text model.
        form: of weights and cache.
        contexts: tokens of each row, including this step's.
        tokens: of each row that this step runs.
    """
    c, total = config, len(contexts) * tokens
    expert, dense = 3 * c.width * c.expert_width, 3 * c.width * c.dense_width
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    head = c.vocab * c.width
    moved, linear, exact = 2.0 * head, 0.0, 2.0 * head * len(contexts)
    for layer in range(c.layers):
        moved += form.count_bytes(attention, is_attention=True)
        if form.quantization == "fp8" and form.attention:
            linear += 2 * attention * total
        else:
            exact += 2 * attention * total
        if c.is_moe(layer):
            moved += form.count_bytes(expert * (1 + count_experts(c.experts, total)))
            moved += 2 * c.experts * c.width
            linear += 2 * 2 * expert * total
        else:
            moved += form.count_bytes(dense)
            linear += 2 * dense * total
        for context in contexts:
            seen = [_count_seen(c, layer, at) for at in range(context - tokens, context)]
            moved += 2 * form.cache_bytes * c.kv_heads * c.head_dim * max(seen)
            exact += 4 * c.heads * c.head_dim * sum(seen)
    if form.quantization == "fp8":
        return Cost(moved, {"fp8": linear, "bfloat16": exact})
    return Cost(moved, {"bfloat16": linear + exact})


def _count_seen(config: TextConfig, layer: int, position: int) -> int:
    """Count the positions that a token sees, including its own."""
    return 1 + (position if config.is_nope(layer) else position % config.chunk)
