"""External programs against a real server: lm-eval, schemathesis and a browser."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.servers import MODEL, make_image, make_llm, run_server

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
"""
WRITE = """\
output_type: generate_until
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 8
  temperature: 0
metric_list:
  - metric: exact_match
"""
QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "water", "one two"], "answer": 0},
    {"question": "Light in the air", "choices": ["and", "the people"], "answer": 1},
    {"question": "Why", "choices": ["not", "because", "?"], "answer": 2},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    llm = make_llm(tmp_path_factory.mktemp("models") / "tiny", max_model_len=1024)
    with run_server(llm) as running:
        yield running
        running.wait_idle()


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in its own process; its warnings are not the tests'."""
    return subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def evaluate(server, folder: Path, model: str, path: str, *words: str) -> dict:
    """Run lm-eval on all tasks of a folder; return results and samples by task."""
    given = f"model={MODEL},base_url={server.url}{path},num_concurrent=2,max_retries=1"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", given]
    tasks = ",".join(sorted(file.stem for file in folder.glob("*.yaml")))
    places = ["--tasks", tasks, "--include_path", folder, "--output_path", folder / "out"]
    hidden = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = run(*command, *places, "--log_samples", *words, **hidden)
    assert done.returncode == 0, done.stderr[-20_000:]
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {
        file.stem.removeprefix("samples_").rpartition("_")[0]: [
            json.loads(line) for line in file.read_text().splitlines()
        ]
        for file in (folder / "out").rglob("samples_*.jsonl")
    }
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


def write_tasks(folder: Path, **kinds: str) -> None:
    data = folder / "data.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)


@pytest.mark.slow
def test_lm_eval_scores_and_generates_through_local_completions(server, tmp_path):
    write_tasks(tmp_path, choice=CHOICE, write=WRITE)
    found = evaluate(server, tmp_path, "local-completions", "/v1/completions")
    assert found["results"]["choice"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    assert len(found["samples"]["choice"]) == len(found["samples"]["write"]) == len(QUESTIONS)
    for sample in found["samples"]["choice"]:
        doc = sample["doc"]
        for choice, (response,) in zip(doc["choices"], sample["resps"], strict=True):
            # lm-eval's reading of the response equals the response.
            context, whole = (
                server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
                for text in (doc["question"], f"{doc['question']} {choice}")
            )
            body = {"prompt": whole["tokens"], "echo": True, "logprobs": 1, "max_tokens": 0}
            scored = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
            wanted = sum(scored["token_logprobs"][context["count"] :])
            assert float(response[0]) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_lm_eval_generates_through_local_chat_completions(server, tmp_path):
    write_tasks(tmp_path, write=WRITE)
    chat = ("local-chat-completions", "/v1/chat/completions", "--apply_chat_template")
    found = evaluate(server, tmp_path, *chat)
    for sample in found["samples"]["write"]:
        talk = [{"role": "user", "content": sample["doc"]["question"]}]
        body = {"messages": talk, "max_tokens": 8, "temperature": 0, "stop": ["\n\n"]}
        answer = server.post("/v1/chat/completions", body).json()
        assert sample["resps"][0][0] == answer["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_schemathesis_finds_no_response_outside_the_schema(server, tmp_path):
    done = run(
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
        *("--max-examples", "10", "--generation-deterministic", "--request-timeout", "120"),
        *("--max-response-time", "100"),
        *("--continue-on-failure", "--warnings", "off", "--no-color"),
    )
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "11 selected / 11 total" in done.stdout


@pytest.mark.slow
def test_the_chat_page_works_in_a_browser(server, tmp_path):
    assert shutil.which("node"), "node is missing: apt-get install nodejs npm"
    assert CHROMIUM, "Chromium is missing: apt-get install chromium"
    assert (HERE / "page" / "node_modules" / "playwright-core").is_dir(), (
        "playwright-core is missing: npm ci --prefix tests/server/page"
    )
    image = tmp_path / "image.png"
    image.write_bytes(make_image())
    words = ("node", HERE / "page" / "chat.js", f"{server.url}/", CHROMIUM, image)
    done = run(*words, tmp_path / "shot", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["errors"] == []
    assert all(url.startswith((server.url, "data:", "blob:")) for url in seen["requests"])
    assert seen["model"] == MODEL
    # The text grew with the stream, and the note shows its speed.
    assert len(seen["lengths"]) > 3 and seen["lengths"] == sorted(seen["lengths"])
    assert seen["lengths"][-1] == len(seen["answer"].encode("utf-16-le")) // 2
    assert "tokens/s" in seen["note"] and "first after" in seen["note"]
    assert seen["pictures"] == 1 and len(seen["notes"]) == 2
    assert seen["stopped"].endswith("stopped")
    assert not seen["overflow"] and seen["left"] == 0
