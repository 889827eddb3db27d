"""Scores on the test split: questions, answers of the engine, and accuracy."""

import collections
import dataclasses
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from l4jax import checkpoint
from l4jax.engine.request import SamplingParams
from l4jax.llm import LLM
from l4jax.train import tasks
from l4jax.train.batches import DataConfig, make_batch
from l4jax.train.charts import draw
from l4jax.train.documents import Document, ExampleEncoder
from l4jax.train.splits import sample_from
from l4jax.train.tasks import Exchange
from l4jax.train.train_step import Hyperparameters, compute_loss

TASKS = ("chart", "needle", "tool", "arithmetic", "fact")
TOLERANCE = 0.05  # relative error of a chart's number, as in ChartQA (arXiv:2203.10244)
MAX_ANSWER_TOKENS = 48


def list_questions(
    encoder: ExampleEncoder, chunk: int, count: int, *, seed: int = 0, split: str = "test"
) -> list[Exchange]:
    """List `count` one-turn questions of each of `TASKS`; needles 0 to 5 chunk boundaries back."""
    rng = random.Random(f"{seed} questions {split}")
    questions = []
    for index in range(count):
        questions += [
            sample_from(split, tasks.make_chart_exchange, rng, 1.0),
            sample_from(split, tasks.make_needle, rng, encoder.count, chunk, index % 6),
            sample_from(split, tasks.make_tool_call, rng),
            sample_from(split, tasks.make_arithmetic, rng),
            sample_from(split, tasks.make_fact, rng),
        ]
    return questions


def is_correct(exchange: Exchange, answer: str) -> bool:
    """Return True for a correct answer: relaxed accuracy for charts, exact match otherwise.

    For a sum on a chart, the number after the last "=" counts. Numbers on charts may be 5 % off.
    Lists of values, words and all other answers must match exactly.
    """
    expected, answer = exchange.turns[0][1].strip(), answer.strip()
    if exchange.kind != "chart":
        return answer == expected
    expected, answer = (text.rpartition("=")[2].strip() for text in (expected, answer))
    if re.fullmatch(r"-?\d+(\.\d+)?", expected) and re.fullmatch(r"-?\d+(\.\d+)?", answer):
        return abs(float(answer) - float(expected)) <= TOLERANCE * abs(float(expected))
    return answer == expected


def generate_answers(llm: LLM, encoder: ExampleEncoder, exchanges: Sequence[Exchange]) -> list[str]:
    """Generate the engine's greedy answers to the first question of each exchange."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    answers = [""] * len(exchanges)
    plain = [at for at, exchange in enumerate(exchanges) if exchange.picture is None]
    # `chat` takes one list of tools for all prompts, but tools differ: these prompts are token ids.
    prompts = [{"prompt_token_ids": take_prompt(encoder(exchanges[at]))} for at in plain]
    pictured = [at for at, exchange in enumerate(exchanges) if exchange.picture is not None]
    messages = [make_messages(exchanges[at]) for at in pictured]
    outputs = llm.generate(prompts, params, use_tqdm=False) if prompts else []
    outputs += llm.chat(messages, params, use_tqdm=False) if messages else []
    for at, output in zip(plain + pictured, outputs, strict=True):
        answers[at] = output.outputs[0].text
    return answers


def take_prompt(document: Document) -> list[int]:
    """Return the tokens of a document before its first answer."""
    return document.token_T[: int(np.flatnonzero(document.weight_T)[0])].tolist()


def group_scores(exchanges: Iterable[Exchange], answers: Iterable[str]) -> dict[str, float]:
    """Compute the accuracy of each task, and of needles at each distance and depth."""
    groups: dict[str, list[bool]] = collections.defaultdict(list)
    for exchange, answer in zip(exchanges, answers, strict=True):
        right = is_correct(exchange, answer)
        groups[exchange.kind].append(right)
        if exchange.kind == "chart":
            groups[f"chart: {_classify_question(exchange)}"].append(right)
        if exchange.distance is not None and exchange.depth is not None:
            groups[f"needle: {exchange.distance} boundaries"].append(right)
            groups[f"needle: {int(4 * exchange.depth)}/4 deep"].append(right)
    return {name: float(np.mean(groups[name])) for name in sorted(groups)}


def count_experts(folder: Path, rows: int = 8) -> np.ndarray:
    """Count the test tokens of each expert of each layer: int32 [layers, E]."""
    config = checkpoint.load_config(folder)
    assert config.vision is not None
    device = SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load(folder, config, jnp.float32, lambda _: device, progress=False)
    chunk = config.text.chunk
    data = DataConfig(
        *(folder, 0, 1, rows, 6 * chunk, chunk, 4 * rows, config.vision.features), split="test"
    )
    levels_C256 = ExampleEncoder.from_folder(folder).processor.levels_C256
    hparams = Hyperparameters(steps=1, dtype="float32")
    _, metrics = jax.jit(
        lambda params, packed: compute_loss(params, packed, config, hparams, levels_C256)
    )(params, make_batch(data, 1))
    return np.asarray(metrics["load_LE"])


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores of one model in several formats and on several meshes.

    Attributes:
        counts: questions per task.
        columns: format and mesh -> score -> accuracy.
    """

    counts: int
    columns: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        names = sorted({name for column in self.columns.values() for name in column})
        lines = ["| | " + " | ".join(self.columns) + " |", "|---|" + "---:|" * len(self.columns)]
        for name in names:
            shares = [f"{column[name]:.1%}" for column in self.columns.values()]
            lines.append(f"| {name} | " + " | ".join(shares) + " |")
        return "\n".join(lines)


def format_loads(loads_LE: Any) -> str:
    """Format a histogram of the experts' shares of the tokens, a line per layer."""
    lines = []
    for layer, load_E in enumerate(np.asarray(loads_LE, np.float64)):
        share_E = load_E / load_E.sum()
        bars = "  ".join(f"{'#' * round(20 * share):20} {share:5.1%}" for share in share_E)
        lines.append(f"layer {layer:2}  {bars}")
    return "\n".join(lines)


def normalize(document: Document, encoder: ExampleEncoder) -> np.ndarray | None:
    """Normalize a document's tiles as the image processor does, to float32; None without tiles."""
    if not len(document.tiles_ICYX):
        return None
    levels_C256 = encoder.processor.levels_C256
    return np.stack(
        [levels_256[document.tiles_ICYX[:, c]] for c, levels_256 in enumerate(levels_C256)], axis=1
    )


def compute_standard_error(share: float, count: int) -> float:
    """Compute the standard error of an accuracy over `count` questions."""
    return (share * (1 - share) / count) ** 0.5


def make_messages(exchange: Exchange) -> list[dict[str, Any]]:
    """Make chat messages of the first question about an image."""
    assert exchange.picture is not None
    image = {"type": "image", "image": draw(exchange.picture).image}
    return [{"role": "user", "content": [image, {"type": "text", "text": exchange.turns[0][0]}]}]


_WORDS = ("value of", "largest", "smallest", "sum", "difference", "How many", "color")


def _classify_question(exchange: Exchange) -> str:
    question = exchange.turns[0][0]
    return next((word for word in _WORDS if word in question), "list")
