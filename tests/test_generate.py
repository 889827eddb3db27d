"""The generate command, in its own process."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from l4jax import generate, serve
from l4jax.config import TINY
from l4jax.testing import write_model
from l4jax.train import bundle


def run_generate(*words: str, cache: os.PathLike, stdin: str = "") -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "NPROC", "XLA_"))}
    environment = {**kept, "L4JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "l4jax.generate", *words],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_the_first_command_answers_and_the_second_run_answers_the_same(cache):
    first = run_generate("--mesh", "8", cache=cache)
    assert first.returncode == 0, first.stderr
    assert "blue light" in first.stdout
    assert "No --model: the tiny Llama 4 that comes with l4jax answers" in first.stderr
    assert "the mesh data=1,model=8 is made of 8 CPU devices" in first.stderr
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s; time to first token", first.stderr)
    assert "Traceback" not in first.stderr
    second = run_generate("--mesh", "8", cache=cache)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout


@pytest.mark.slow
def test_the_image_sample_is_the_bundled_chart(cache):
    marks = bundle.make_sample()
    done = run_generate("--image", "sample", "--prompt", "Which bar is the largest?", cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == marks.labels[marks.values.index(max(marks.values))]
    listed = run_generate("--image", "sample", cache=cache)
    assert all(label in listed.stdout for label in marks.labels)


@pytest.mark.slow
def test_options_images_and_standard_input(cache, tmp_path):
    picture = tmp_path / "picture.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 300, 3), np.uint8)).save(picture)
    words = ["--tensor-parallel-size", "2", "--image", str(picture), "--image", str(picture)]
    words += ["--system", "Be brief.", "--max-tokens", "5", "--temperature", "0", "--seed", "3"]
    words += ["--dtype", "float32", "--max-model-len", "2048", "--attn-temperature-tuning", "off"]
    piped = run_generate(*words, cache=cache, stdin="What is it?")
    prompted = run_generate(*words, "--prompt", "What is it?", cache=cache)
    assert piped.returncode == prompted.returncode == 0, piped.stderr
    assert piped.stdout == prompted.stdout
    for done in (piped, prompted):
        assert re.search(r"^[1-5] tokens, [\d.]+ tokens/s", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mesh", "16x"], "write 8, 2x4 (data x model)"),
        (["--model", "./nowhere"], "nowhere"),
        (["--image", "nothing.png"], "nothing.png"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--top-p", "7"], "top_p is 7.0"),
    ],
)
def test_invalid_arguments_give_one_line_and_exit_code_1(words, says, capsys):
    assert generate.main([*words, "--prompt", "a"]) == 1
    told = capsys.readouterr()
    last = told.err.strip().splitlines()[-1]
    assert last.startswith("l4jax.generate: ") and says in last
    assert "Traceback" not in told.err and told.out == ""


def test_limit_of_the_checkpoint_is_the_default_of_commands(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "model", TINY.replace_text(layers=1).replace_vision(layers=1))
    path = tmp_path / "model" / "generation_config.json"
    raw = {"max_new_tokens": 3, "temperature": 0.0, "repetition_penalty": 1.25}
    path.write_text(json.dumps(raw))
    words = ["--model", str(tmp_path / "model")]
    assert generate.main([*words, "--prompt", "a"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("3 tokens, ")
    services = []
    monkeypatch.setattr("l4jax.server.run.serve", lambda service: services.append(service) or 0)
    assert serve.main(words) == 0
    assert serve.main([*words, "--override-generation-config", '{"max_new_tokens": 2}']) == 0
    assert serve.main([*words, "--generation-config", "vllm"]) == 0
    assert [service.options.max_new_tokens for service in services] == [3, 2, None]
    assert [service.defaults.repetition_penalty for service in services] == [1.25, 1.25, 1.0]
