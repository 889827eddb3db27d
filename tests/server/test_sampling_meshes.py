"""Every sampling feature over HTTP, on every kind of mesh."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.servers import MODEL, Running, make_llm, run_server

PROMPT = [11, *range(100, 140)]
PLAIN = {"model": MODEL, "prompt": PROMPT, "max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
RANDOM = {"temperature": 1.0, "seed": 5 + 2**40}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "prompt logprobs": {"prompt_logprobs": 2},
    "presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": -2.0},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": {"65": 9.0}},
    "min tokens": {"min_tokens": 3, "stop_token_ids": [*range(40, 250)][:24]},
    "bad words": {"bad_words": ["do", "d", "o"]},
    "structured outputs": {"structured_outputs": {"regex": "[ab]{4}"}},
    "seed": RANDOM,
    "filters": {**RANDOM, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "n": {**RANDOM, "n": 3},
    "all": {
        **RANDOM,
        "n": 2,
        "logprobs": 1,
        "prompt_logprobs": 0,
        "logit_bias": {"65": 4.0},
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "bad_words": ["a"],
        "min_tokens": 5,
    },
}


def ask(server: Running, name: str) -> dict[str, Any]:
    """Return an answer: texts, tokens and reasons, and all log-probabilities apart."""
    answer = server.post("/v1/completions", {**PLAIN, **FEATURES[name], **as_ids(name)})
    assert answer.status_code == 200, (name, answer.text)
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    return {
        "outputs": [
            (each["text"], each["finish_reason"], (each["logprobs"] or {}).get("tokens"))
            for each in choices
        ],
        "logprobs": [
            value
            for each in choices
            for value in [
                *((each["logprobs"] or {}).get("token_logprobs") or ()),
                *(
                    entry["logprob"]
                    for position in each.get("prompt_logprobs") or ()
                    for entry in (position or {}).values()
                ),
            ]
        ],
    }


def as_ids(name: str) -> dict[str, Any]:
    return {"return_tokens_as_token_ids": True} if "logprobs" in FEATURES[name] else {}


@pytest.fixture(scope="module")
def run_on(tmp_path_factory):
    """Ask for all features at once, on a mesh; the folder of the model is the same for all."""
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"

    @functools.cache
    def run(mesh: str) -> dict[str, dict[str, Any]]:
        llm = make_llm(folder, mesh=mesh, max_num_seqs=4)
        together = ThreadPoolExecutor(len(FEATURES))
        with run_server(llm, max_waiting=64) as server, together:
            answers = together.map(functools.partial(ask, server), FEATURES)
            found = dict(zip(FEATURES, answers, strict=True))
            server.wait_idle()
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x1", "2x4", "8"])
def test_every_sampling_feature_gives_the_same_over_http_on_every_mesh(run_on, mesh):
    """Plain requests run at the same time, and none fails."""
    plain, sharded = run_on("1"), run_on(mesh)
    for name, wanted in plain.items():
        assert sharded[name]["outputs"] == wanted["outputs"], name
        assert sharded[name]["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-3), name
        has_logprobs = {"logprobs", "prompt_logprobs"} & set(FEATURES[name])
        assert bool(wanted["logprobs"]) == bool(has_logprobs), name
    assert len(plain["n"]["outputs"]) == 3
    greedy = plain["plain"]["outputs"][0][0]
    same = {name for name in FEATURES if plain[name]["outputs"][0][0] == greedy}
    assert same <= {"plain", "logprobs", "prompt logprobs", "min tokens"}
