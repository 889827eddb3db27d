"""Sharding strategies: the mesh axes of each logical axis of `l4jax.axes`.

A strategy is a diff of another one. A logical axis without a rule raises.

Pipeline parallelism is left out. A stage would pass 10 KB a token (bfloat16, width 5,120), where
tensor parallelism reduces 20 KB a token in each layer: it pays over slow links. But a stage idles
unless as many microbatches run as there are stages, each microbatch reads the weights of its stage
again, and a token still waits for all layers, one stage after another. The eight devices of a host
hold Scout and Maverick. Over hosts, data shards have requests of their own, and only routed tokens
travel: 10 KB to the expert and 10 KB back, in 24 of Maverick's layers 0.5 MB a token. A device with
32 requests and steps of 20 ms sends 0.8 GB/s, 1/60 of a link of 400 Gb/s. Links below 10 Gb/s, or a
dense model beyond a host's memory, would change that.
"""

import contextlib
from collections.abc import Generator

import jax
from flax import linen as nn

from l4jax import axes
from l4jax.config import Config
from sharding import DATA, MODEL, SEQ, Layout, Rules, parse_mesh

REPLICATED = Rules.replicate("replicated", axes.ALL)

# Megatron's tensor parallelism: kv heads and the inside of each feed-forward block over `model`,
# two all-reduces a layer, and the vocabulary. Requests and their KV pages over `data`; each data
# shard has all weights.
TENSOR = REPLICATED.change(
    "tensor",
    {
        axes.VOCAB: MODEL,
        axes.KV_HEADS: MODEL,
        axes.HIDDEN: MODEL,
        axes.EXPERT_HIDDEN: MODEL,
        axes.VISION_HEADS: MODEL,
        axes.VISION_HIDDEN: MODEL,
        axes.ADAPTER_HIDDEN: MODEL,
        axes.TOKENS: DATA,
        axes.ROWS: DATA,
        axes.PAGES: DATA,
    },
)

# Tensor parallelism with image tiles over `data`: a training step has as many tiles as rows.
TRAINING = TENSOR.change("training", {axes.TILES: DATA})

# Expert parallelism: each device has whole experts. Attention and the shared expert stay cut over
# `model`. With data shards the experts are spread over all of them, and tokens travel.
_EXPERTS = {axes.EXPERTS: (DATA, SEQ, MODEL), axes.EXPERT_HIDDEN: None}
EXPERT = TENSOR.change("expert", _EXPERTS)

# Context parallelism: each page of the global layers is striped over `seq`. Local layers have their
# chunk on every device of it. Feed-forward blocks and the vocabulary are cut over both axes, so
# that `seq` repeats no weights but attention's.
CONTEXT = TENSOR.change(
    "context",
    {
        axes.PAGES: (DATA, SEQ),
        axes.STRIPES: SEQ,
        axes.HIDDEN: (SEQ, MODEL),
        axes.EXPERT_HIDDEN: (SEQ, MODEL),
        axes.VOCAB: (SEQ, MODEL),
    },
)
CONTEXT_EXPERT = CONTEXT.change("context-expert", _EXPERTS)

STRATEGIES = {rules.name: rules for rules in (TENSOR, TRAINING, EXPERT, CONTEXT, CONTEXT_EXPERT)}


def choose_strategy(mesh: str | int, *, enable_expert_parallel: bool = False) -> Rules:
    """Return the strategy of a mesh, in the syntax of `sharding.parse_mesh`."""
    if parse_mesh(mesh)[SEQ] > 1:
        return CONTEXT_EXPERT if enable_expert_parallel else CONTEXT
    return EXPERT if enable_expert_parallel else TENSOR


@contextlib.contextmanager
def activate(layout: Layout) -> Generator[None]:
    """Trace and run under a layout: its mesh is set, and the model's axes follow its rules."""
    with jax.set_mesh(layout.mesh), nn.logical_axis_rules(tuple(layout.rules.table.items())):
        yield


def check_mesh(config: Config, layout: Layout) -> None:
    """Refuse a mesh that does not divide the model evenly (`sharding.MeshError`)."""
    text, vision = config.text, config.vision
    layout.check(axes.KV_HEADS, text.kv_heads, "kv heads")
    layout.check(axes.VOCAB, text.vocab, "words of the vocabulary")
    layout.check(axes.HIDDEN, text.expert_width, "columns of a shared expert")
    layout.check(axes.EXPERT_HIDDEN, text.expert_width, "columns of an expert")
    layout.check(axes.EXPERTS, text.experts, "experts")
    if text.moe_interval > 1:
        layout.check(axes.HIDDEN, text.dense_width, "columns of a dense layer")
    if vision is not None:
        layout.check(axes.VISION_HEADS, vision.heads, "vision heads")
        layout.check(axes.VISION_HIDDEN, vision.hidden, "columns of a vision layer")
        layout.check(axes.ADAPTER_HIDDEN, vision.adapter_width, "columns of the vision adapter")
