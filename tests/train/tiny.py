"""A tiny model that trains in seconds, with its tokenizer and training configuration."""

import dataclasses
import functools
import tempfile
from pathlib import Path

from l4jax.config import TINY, RopeScaling
from l4jax.train.batches import DataConfig
from l4jax.train.tokenizer import train_tokenizer
from l4jax.train.train_step import Hyperparameters
from l4jax.train.trainer import TrainingConfig

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
def make_tokenizer_folder() -> Path:
    """Train a tokenizer of 1024 tokens, once per process."""
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    train_tokenizer(folder, vocab_size=CONFIG.text.vocab, examples=200)
    return folder


def make_training_config(steps: int, *, folder: Path | None = None, **changes) -> TrainingConfig:
    """Make a training configuration: two rows of four chunks per step, two tiles, float32."""
    data_config = DataConfig(
        folder=folder or make_tokenizer_folder(),
        seed=0,
        steps=steps,
        rows=2,
        length=4 * CHUNK,
        chunk=CHUNK,
        tiles=2,
        features=144,
    )
    hparams = Hyperparameters(steps=steps, rate=3e-3, warmup=5, dtype="float32")
    training = TrainingConfig(CONFIG, data_config, hparams, save_every=4, note_every=1)
    return dataclasses.replace(training, **changes)
