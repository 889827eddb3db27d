"""The bundled model: its sizes, how it is trained, and how it is laid out for whoever loads it."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from l4jax import checkpoint
from l4jax.checkpoint.names import publish
from l4jax.checkpoint.parameters import flatten
from l4jax.checkpoint.safetensors import write_safetensors
from l4jax.config import TINY, Config, RopeScaling
from l4jax.model import Parameters
from l4jax.testing.model import write_json
from l4jax.text.tokenizer import Tokenizer
from l4jax.train.batches import Recipe
from l4jax.train.charts import Chart, draw, make_chart
from l4jax.train.learning import Teaching
from l4jax.train.run import Plan
from l4jax.train.splits import draw_from

# 10.9 million weights, 21.8 MB in BF16. Eight kv heads and what follows from them, so that a mesh
# of 8 can cut it; two global layers, and a chunk that one picture of one tile and a question about
# it fit in, so that only larger ones need the global layers.
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
    # Norms without a gain of their own would bound scores at 5.7 in heads of 32.
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


def make_plan(
    steps: int,
    *,
    rows: int = 12,
    seed: int = 0,
    save_every: int = 1000,
    config: Config = CONFIG,
    **teaching: Any,
) -> Plan:
    """The bundled model's training: rows of six chunks, for needles five boundaries away.

    Args:
        steps: of the whole training.
        rows: of a batch; five tiles of pictures a row.
        seed: of weights and data.
        save_every: steps.
        config: of the model.
        teaching: fields of `Teaching` other than the steps.
    """
    assert config.vision is not None
    recipe = Recipe(
        folder=checkpoint.BUNDLED,
        seed=seed,
        steps=steps,
        rows=rows,
        length=6 * config.text.chunk,
        chunk=config.text.chunk,
        tiles=5 * rows,
        features=config.vision.features,
    )
    return Plan(config, recipe, Teaching(steps=steps, **teaching), save_every)


def make_sample() -> Chart:
    """A chart of the test split in one tile, to ask the model about."""
    assert CONFIG.vision is not None
    rng, tile = random.Random(0), CONFIG.vision.tile
    while True:
        chart = draw_from("test", make_chart, rng, 0.9)
        is_small = (chart.width, chart.height) == (tile, tile)
        if chart.kind == "bar" and chart.title and len(chart.labels) == 5 and is_small:
            return chart


def export(folder: Path, config: Config, params: Parameters, vocabulary: Path) -> Config:
    """Write a trained model as Hugging Face lays it out, in BF16.

    Args:
        folder: where; files of the same names are replaced.
        config: of the model; the ids of tokens are taken from the tokenizer.
        params: float32, on any devices.
        vocabulary: the folder with its tokenizer, which is copied.

    Returns:
        The config that was written, with ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (vocabulary / name).resolve() != (folder / name).resolve():
            shutil.copyfile(vocabulary / name, folder / name)
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
        tensors |= publish(path, value, is_whole=config.vision is not None)
    write_safetensors(folder / "model.safetensors", tensors)
    return config
