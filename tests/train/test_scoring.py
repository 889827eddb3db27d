"""Laws of scores: correct answers, the questions, the tables and the model card."""

import json
import random
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from l4jax import LLM, checkpoint
from l4jax.checkpoint.safetensors import Index
from l4jax.train import bundle, scoring, tasks
from l4jax.train.card import render_card
from l4jax.train.documents import ExampleEncoder
from l4jax.train.splits import assign_split
from l4jax.train.train_step import Hyperparameters, initialize
from scripts import score_bundled
from tests.train import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    state = jax.jit(lambda: initialize(tiny.CONFIG, Hyperparameters(steps=1), 0))()
    bundle.export(folder, tiny.CONFIG, state.params, tiny.make_tokenizer_folder())
    return folder


def make_question(kind: str, wanted: str) -> tasks.Exchange:
    return tasks.Exchange(kind, "key", (("question", wanted),))


@pytest.mark.parametrize(
    ("kind", "wanted", "answer", "right"),
    [
        ("chart", "40", "42", True),
        ("chart", "40", "43", False),
        ("chart", "40", "38.0", True),
        ("chart", "20 + 20 = 40", "21 + 20 = 41", True),
        ("chart", "20 + 20 = 40", "20 + 20 = 44", False),
        ("chart", "Rome", "Rome", True),
        ("chart", "Rome", "Oslo", False),
        ("chart", "Rome 40, Oslo 3", "Rome 41, Oslo 3", False),
        ("chart", "40", "", False),
        ("arithmetic", "40", "41", False),
        ("arithmetic", "40", "40 ", True),
        ("tool", '[add(a=1, b="x")]', '[add(a=1, b="x")]', True),
        ("tool", '[add(a=1, b="x")]', '[add(a=1, b="y")]', False),
    ],
)
def test_charts_are_scored_with_tolerance_and_other_answers_by_exact_match(
    kind, wanted, answer, right
):
    assert scoring.is_correct(make_question(kind, wanted), answer) is right


def test_questions_are_of_the_test_split_with_needles_at_every_distance(folder):
    encoder = ExampleEncoder.from_folder(folder)
    questions = scoring.list_questions(encoder, 64, 12)
    assert questions == scoring.list_questions(encoder, 64, 12)
    assert all(assign_split(exchange.key) == "test" for exchange in questions)
    assert [x.kind for x in questions].count("chart") == 12
    assert len(questions) == 12 * len(scoring.TASKS)
    distances = [x.distance for x in questions if x.kind == "needle"]
    assert distances == [*range(6), *range(6)]


def test_needle_scores_are_grouped_by_distance_and_depth(folder):
    encoder = ExampleEncoder.from_folder(folder)
    questions = scoring.list_questions(encoder, 64, 6)
    answers = [x.turns[0][1] if x.kind != "needle" or x.distance == 5 else "?" for x in questions]
    scores = scoring.group_scores(questions, answers)
    assert scores["chart"] == scores["tool"] == scores["arithmetic"] == scores["fact"] == 1
    assert scores["needle"] == pytest.approx(1 / 6)
    assert scores["needle: 5 boundaries"] == 1 and scores["needle: 4 boundaries"] == 0
    assert any(name.startswith("needle: ") and name.endswith("deep") for name in scores)


def test_the_engine_gets_the_prompts_that_training_encodes(folder, monkeypatch):
    """The engine's prompts are the documents up to their first answers."""
    llm = LLM(folder, quiet=True, max_num_seqs=4, max_model_len=1024)
    encoder, seen = ExampleEncoder.from_folder(folder), []
    add = llm.engine.add

    def listen(token_ids, *rest, **named):
        seen.append(list(token_ids))
        return add(token_ids, *rest, **named)

    monkeypatch.setattr(llm.engine, "add", listen)
    monkeypatch.setattr(scoring, "MAX_ANSWER_TOKENS", 2)
    questions = scoring.list_questions(encoder, 64, 1)
    answers = scoring.generate_answers(llm, encoder, questions)
    assert len(answers) == len(questions)
    wanted = [scoring.take_prompt(encoder(exchange)) for exchange in questions]
    assert sorted(seen) == sorted(wanted)
    assert any(exchange.picture is not None for exchange in questions)


def test_every_test_token_is_counted_for_one_expert(folder):
    loads_LE = scoring.count_experts(folder, rows=1)
    text = tiny.CONFIG.text
    assert loads_LE.shape == (text.layers, text.experts)
    assert len(set(loads_LE.sum(1))) == 1 and loads_LE.sum(1)[0] > 100
    lines = scoring.format_loads([[30, 10, 0, 0]]).splitlines()
    assert len(lines) == 1 and "75.0%" in lines[0] and lines[0].count("#") == 20


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_the_card(folder, monkeypatch, capsys):
    words = ["--count", "1", "--formats", "int4", "--meshes", "1", "--card"]
    monkeypatch.setattr(sys, "argv", ["score_bundled", "--model", str(folder), *words])
    monkeypatch.setattr(scoring, "MAX_ANSWER_TOKENS", 2)
    score_bundled.main()
    out = capsys.readouterr().out
    assert "| int4, mesh 1 |" in out and "| arithmetic | 0.0% |" in out
    card = (folder / "README.md").read_text()
    assert card == render_card(folder) and "| arithmetic | 0.0% |" in card
    weights = sum(int(np.prod(shape)) for _, shape in Index.open(folder).specs.values())
    assert f"{weights / 1e6:.1f} million weights" in card
    assert json.loads((folder / "scores.json").read_text())["count"] == 1


def test_the_bundled_card_is_rendered_from_the_bundled_scores():
    card = (checkpoint.BUNDLED / "README.md").read_text(encoding="utf-8")
    assert card == render_card(checkpoint.BUNDLED)


def test_the_standard_error_is_binomial():
    rng = random.Random(0)
    shares = [sum(rng.random() < 0.9 for _ in range(100)) / 100 for _ in range(2000)]
    assert np.std(shares) == pytest.approx(scoring.compute_standard_error(0.9, 100), rel=0.05)
