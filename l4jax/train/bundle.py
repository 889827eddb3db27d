"""The bundled model: its config, its training configuration, and its export as a checkpoint."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from l4jax import checkpoint
from l4jax.checkpoint.names import export_parameter
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.safetensors import write_safetensors
from l4jax.config import TINY, Config, RopeScaling
from l4jax.model import Parameters
from l4jax.testing.model import write_json
from l4jax.text.tokenizer import Tokenizer
from l4jax.train.batches import DataConfig
from l4jax.train.charts import Chart, draw, make_chart
from l4jax.train.splits import sample_from
from l4jax.train.train_step import Hyperparameters
from l4jax.train.trainer import TrainingConfig

# 10.9 million weights, 21.8 MB in BF16. A mesh of 8 can shard it: the kv heads and other sharded
# sizes are multiples of 8. It has two global layers. An image of one tile and a question about it
# fit in one chunk; only larger images need the global layers.
CONFIG = TINY.replace_text(
    vocab=2048,
    width=256,
    layers=8,
    head_dim=32,
    expert_width=128,
    dense_width=512,
    chunk=256,
    max_positions=4096,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 256),
    # QK norms have no learned gain; they would bound attention scores at 5.7 with a head dim of 32.
    has_qk_norm=False,
    floor_scale=256,
).replace_vision(width=192, layers=5, hidden=768, adapter_width=256)
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def make_training_config(
    steps: int,
    *,
    rows: int = 12,
    seed: int = 0,
    save_every: int = 1000,
    model: Config = CONFIG,
    **hparams: Any,
) -> TrainingConfig:
    """Make the bundled model's training configuration: rows of six chunks.

    Six chunks hold needles five chunk boundaries back.

    Args:
        steps: of the whole run.
        rows: of a batch; five image tiles per row.
        seed: of weights and data.
        save_every: steps between saved states.
        model: the model's config.
        hparams: fields of `Hyperparameters` except the steps.
    """
    assert model.vision is not None
    data = DataConfig(
        folder=checkpoint.BUNDLED,
        seed=seed,
        steps=steps,
        rows=rows,
        length=6 * model.text.chunk,
        chunk=model.text.chunk,
        tiles=5 * rows,
        features=model.vision.features,
    )
    return TrainingConfig(model, data, Hyperparameters(steps=steps, **hparams), save_every)


def make_sample() -> Chart:
    """Make the sample image: a chart of the test split, in one tile."""
    assert CONFIG.vision is not None
    rng, tile = random.Random(0), CONFIG.vision.tile
    while True:
        chart = sample_from("test", make_chart, rng, 0.9)
        is_small = (chart.width, chart.height) == (tile, tile)
        if chart.kind == "bar" and chart.title and len(chart.labels) == 5 and is_small:
            return chart


def export(folder: Path, config: Config, params: Parameters, tokenizer_folder: Path) -> Config:
    """Write a trained model in Hugging Face's layout, in BF16.

    Args:
        folder: the output folder; files of the same names are replaced.
        config: the model's config; the special token ids come from the tokenizer.
        params: float32, on any devices.
        tokenizer_folder: the folder of the tokenizer, which is copied.

    Returns:
        The written config, with special token ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (tokenizer_folder / name).resolve() != (folder / name).resolve():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    token_id = Tokenizer.from_folder(folder).token_id
    eos_ids = tuple(token_id(f"<|{name}|>") for name in ("end_of_text", "eom", "eot"))
    config = dataclasses.replace(
        config,
        bos_id=token_id("<|begin_of_text|>"),
        eos_ids=eos_ids,
        pad_id=token_id("<|finetune_right_pad|>"),
        patch_id=token_id("<|patch|>") if config.vision else None,
    )
    write_json(
        folder / "config.json", {**checkpoint.format_config(config), "torch_dtype": "bfloat16"}
    )
    greedy = {"do_sample": False, "eos_token_id": list(eos_ids)}
    write_json(folder / "generation_config.json", greedy)
    draw(make_sample()).image.save(folder / checkpoint.SAMPLE.name, optimize=True)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten(params).items():
        value = np.asarray(jax.device_get(leaf)).astype(ml_dtypes.bfloat16)
        tensors |= export_parameter(path, value, has_vision=config.vision is not None)
    write_safetensors(folder / "model.safetensors", tensors)
    return config
