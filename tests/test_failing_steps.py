"""A step that fails is an error in words, and never an empty answer."""

import itertools

import pytest

from l4jax import LLM, GenerationError, SamplingParams, generate
from l4jax.engine.runner import PendingStep, Runner
from l4jax.testing import write_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["one", "two words", "three words here"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32", max_num_seqs=2, loop_steps=4, quiet=True)


def fail(monkeypatch, where: str, at: int) -> None:
    """Let the call number `at` of a step's dispatch, or of the wait for its result, raise."""
    owner, name = {"dispatch": (Runner, "dispatch"), "result": (PendingStep, "result")}[where]
    plain, calls = getattr(owner, name), itertools.count()

    def run(*arguments):
        if next(calls) == at:
            raise RuntimeError("injected\nwith details")
        return plain(*arguments)

    monkeypatch.setattr(owner, name, run)


@pytest.mark.parametrize(("where", "at"), [("dispatch", 0), ("result", 1)])
def test_generate_prints_a_sentence_and_returns_1(folder, monkeypatch, capsys, caplog, where, at):
    fail(monkeypatch, where, at)
    words = ["--model", str(folder), "--prompt", "a", "--max-tokens", "40", "--temperature", "0"]
    assert generate.main(words) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == "l4jax.generate: a step failed: RuntimeError: injected"
    assert "Traceback" not in told.err and not caplog.records


def test_an_unexpected_error_while_loading_is_one_line(folder, monkeypatch, capsys):
    def load(*_args, **_options):
        raise KeyError("unexpected")

    monkeypatch.setattr(Runner, "load", load)
    assert generate.main(["--model", str(folder), "--prompt", "a"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "l4jax.generate: KeyError: 'unexpected' (L4JAX_TRACEBACK=1 prints a traceback)"
    monkeypatch.setenv("L4JAX_TRACEBACK", "1")
    with pytest.raises(KeyError):
        generate.main(["--model", str(folder), "--prompt", "a"])


@pytest.mark.parametrize(("where", "at"), [("dispatch", 1), ("result", 2), ("result", 0)])
def test_llm_raises_and_keeps_the_outputs_of_other_requests(llm, monkeypatch, where, at):
    wanted = llm.generate(PROMPTS, GREEDY)
    with monkeypatch.context() as patch:
        fail(patch, where, at)
        with pytest.raises(GenerationError, match="requests failed: RuntimeError: injected") as it:
            llm.generate(PROMPTS, GREEDY)
    outputs = [output.outputs[0] for output in it.value.outputs]
    failed = [output for output in outputs if output.finish_reason == "error"]
    assert 1 <= len(failed) < len(PROMPTS)
    assert all(output.error == "RuntimeError: injected" for output in failed)
    for found, expected in zip(outputs, wanted, strict=True):
        if found.finish_reason != "error":
            assert found.token_ids == expected.outputs[0].token_ids and found.error is None
    assert [x.outputs[0].text for x in llm.generate(PROMPTS, GREEDY)] == [
        x.outputs[0].text for x in wanted
    ]


def test_a_stream_raises_after_its_pieces(llm, monkeypatch):
    fail(monkeypatch, "result", 1)
    pieces = llm.stream("one", GREEDY)
    assert next(pieces).token_ids
    with pytest.raises(GenerationError, match="a step failed: RuntimeError: injected"):
        list(pieces)
