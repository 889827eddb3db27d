"""Scores on the test split: what is asked, which answers are right, and who answers."""

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
from l4jax.train.batches import Recipe, make_batch
from l4jax.train.charts import draw
from l4jax.train.documents import Document, Speller
from l4jax.train.learning import Teaching, find_loss
from l4jax.train.splits import draw_from
from l4jax.train.tasks import Exchange

TASKS = ("chart", "needle", "tool", "arithmetic", "fact")
TOLERANCE = 0.05  # of a number read off a chart, as ChartQA allows (arXiv:2203.10244)
LONGEST = 48  # tokens of an answer


def list_questions(
    speller: Speller, chunk: int, count: int, *, seed: int = 0, split: str = "test"
) -> list[Exchange]:
    """`count` questions of each of `TASKS`, one turn each; needles at 0 to 5 boundaries in turn."""
    rng = random.Random(f"{seed} questions {split}")
    found = []
    for at in range(count):
        found += [
            draw_from(split, tasks.make_chart_exchange, rng, 1.0),
            draw_from(split, tasks.make_needle, rng, speller.count, chunk, at % 6),
            draw_from(split, tasks.make_tool_call, rng),
            draw_from(split, tasks.make_arithmetic, rng),
            draw_from(split, tasks.make_fact, rng),
        ]
    return found


def is_right(exchange: Exchange, said: str) -> bool:
    """Whether an answer is right: charts by relaxed accuracy, all else to the letter.

    Of a sum on a chart the number behind the last "=" counts. Numbers on charts may be 5 % off;
    lists of values, words and all other answers must be the same text.
    """
    wanted, said = exchange.turns[0][1].strip(), said.strip()
    if exchange.kind != "chart":
        return said == wanted
    wanted, said = (text.rpartition("=")[2].strip() for text in (wanted, said))
    if re.fullmatch(r"-?\d+(\.\d+)?", wanted) and re.fullmatch(r"-?\d+(\.\d+)?", said):
        return abs(float(said) - float(wanted)) <= TOLERANCE * abs(float(wanted))
    return said == wanted


def answer(llm: LLM, speller: Speller, exchanges: Sequence[Exchange]) -> list[str]:
    """What our engine says, greedily, to the first question of each."""
    params = SamplingParams(temperature=0.0, max_tokens=LONGEST)
    said = [""] * len(exchanges)
    plain = [at for at, exchange in enumerate(exchanges) if exchange.picture is None]
    # Tools differ from one question to the next, and `chat` has them for all: hence the ids.
    prompts = [{"prompt_token_ids": cut_prompt(speller(exchanges[at]))} for at in plain]
    pictured = [at for at, exchange in enumerate(exchanges) if exchange.picture is not None]
    messages = [show(exchanges[at]) for at in pictured]
    outputs = llm.generate(prompts, params, use_tqdm=False) if prompts else []
    outputs += llm.chat(messages, params, use_tqdm=False) if messages else []
    for at, output in zip(plain + pictured, outputs, strict=True):
        said[at] = output.outputs[0].text
    return said


def cut_prompt(document: Document) -> list[int]:
    """The tokens of a document before its first answer."""
    return document.token_T[: int(np.flatnonzero(document.weight_T)[0])].tolist()


def group_scores(exchanges: Iterable[Exchange], said: Iterable[str]) -> dict[str, float]:
    """The share of right answers of each task, and of needles at each distance and depth."""
    groups: dict[str, list[bool]] = collections.defaultdict(list)
    for exchange, text in zip(exchanges, said, strict=True):
        right = is_right(exchange, text)
        groups[exchange.kind].append(right)
        if exchange.kind == "chart":
            groups[f"chart: {_name_question(exchange)}"].append(right)
        if exchange.distance is not None and exchange.depth is not None:
            groups[f"needle: {exchange.distance} boundaries"].append(right)
            groups[f"needle: {int(4 * exchange.depth)}/4 deep"].append(right)
    return {name: float(np.mean(groups[name])) for name in sorted(groups)}


def count_experts(folder: Path, rows: int = 8) -> np.ndarray:
    """How many tokens of test data each expert of each layer gets: int32 [layers, E]."""
    config = checkpoint.load_config(folder)
    assert config.vision is not None
    here = SingleDeviceSharding(jax.devices()[0])
    params = checkpoint.load(folder, config, jnp.float32, lambda _: here, progress=False)
    chunk = config.text.chunk
    recipe = Recipe(
        *(folder, 0, 1, rows, 6 * chunk, chunk, 4 * rows, config.vision.features), split="test"
    )
    levels_C256 = Speller.from_folder(folder).processor.levels_C256
    teaching = Teaching(steps=1, dtype="float32")
    _, notes = jax.jit(
        lambda params, packed: find_loss(params, packed, config, teaching, levels_C256)
    )(params, make_batch(recipe, 1))
    return np.asarray(notes["load_LE"])


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores of several ways to compute the same model.

    Attributes:
        counts: questions of each task.
        columns: name of a way -> name of a score -> share of right answers.
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


def draw_loads(loads_LE: Any) -> str:
    """A histogram of the experts of each layer: their shares of the tokens."""
    lines = []
    for layer, load_E in enumerate(np.asarray(loads_LE, np.float64)):
        share_E = load_E / load_E.sum()
        bars = "  ".join(f"{'#' * round(20 * share):20} {share:5.1%}" for share in share_E)
        lines.append(f"layer {layer:2}  {bars}")
    return "\n".join(lines)


def normalize(document: Document, speller: Speller) -> np.ndarray | None:
    """The tiles of a document as the image processor hands them on, float32; None without any."""
    if not len(document.tiles_ICYX):
        return None
    levels_C256 = speller.processor.levels_C256
    return np.stack(
        [levels_256[document.tiles_ICYX[:, c]] for c, levels_256 in enumerate(levels_C256)], axis=1
    )


def find_error(share: float, count: int) -> float:
    """The standard error of a share of right answers among so many."""
    return (share * (1 - share) / count) ** 0.5


def show(exchange: Exchange) -> list[dict[str, Any]]:
    """The first question about a picture, as messages."""
    assert exchange.picture is not None
    picture = {"type": "image", "image": draw(exchange.picture).image}
    return [{"role": "user", "content": [picture, {"type": "text", "text": exchange.turns[0][0]}]}]


_WORDS = ("value of", "largest", "smallest", "sum", "difference", "How many", "color")


def _name_question(exchange: Exchange) -> str:
    question = exchange.turns[0][0]
    return next((word for word in _WORDS if word in question), "list")
