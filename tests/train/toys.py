"""A model that learns in seconds, and what it learns from."""

import dataclasses
import functools
import tempfile
from pathlib import Path

from l4jax.config import TINY, RopeScaling
from l4jax.train.batches import Recipe
from l4jax.train.learning import Teaching
from l4jax.train.run import Plan
from l4jax.train.vocabulary import write_vocabulary

CHUNK = 64
CONFIG = TINY.replace_text(
    vocab=1024,
    layers=2,
    heads=8,
    kv_heads=4,
    expert_width=32,
    dense_width=64,
    nope_interval=2,
    chunk=CHUNK,
    max_positions=1024,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, CHUNK),
    floor_scale=CHUNK,
).replace_vision(layers=1, heads=4, adapter_width=32)


@functools.cache
def find_vocabulary() -> Path:
    """A folder with a tokenizer of 1024 tokens, written once a process."""
    folder = Path(tempfile.mkdtemp(prefix="vocabulary-"))
    write_vocabulary(folder, vocab_size=CONFIG.text.vocab, examples=200)
    return folder


def make_plan(steps: int, *, folder: Path | None = None, **changes) -> Plan:
    """A plan for the toy: two rows of four chunks a step, two tiles, float32."""
    recipe = Recipe(
        folder=folder or find_vocabulary(),
        seed=0,
        steps=steps,
        rows=2,
        length=4 * CHUNK,
        chunk=CHUNK,
        tiles=2,
        features=144,
    )
    teaching = Teaching(steps=steps, rate=3e-3, warmup=5, dtype="float32")
    plan = Plan(CONFIG, recipe, teaching, save_every=4, note_every=1)
    return dataclasses.replace(plan, **changes)
