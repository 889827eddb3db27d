"""Sharding strategies: the mesh axis of each logical axis of `l4jax.axes`.

A strategy is a diff of another one. A logical axis without a rule raises.
"""

import contextlib
from collections.abc import Generator

import jax
from flax import linen as nn

from l4jax import axes
from l4jax.config import Config
from sharding import DATA, MODEL, Layout, Rules

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

STRATEGIES = {rules.name: rules for rules in (TENSOR, TRAINING)}


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
    layout.check(axes.HIDDEN, text.expert_width, "columns of an expert")
    if text.moe_interval > 1:
        layout.check(axes.HIDDEN, text.dense_width, "columns of a dense layer")
    if vision is not None:
        layout.check(axes.VISION_HEADS, vision.heads, "vision heads")
        layout.check(axes.VISION_HIDDEN, vision.hidden, "columns of a vision layer")
        layout.check(axes.ADAPTER_HIDDEN, vision.adapter_width, "columns of the vision adapter")
