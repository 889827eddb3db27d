"""The command: its flags, and a server in its own process, from start to SIGTERM."""

import argparse
import logging
import signal
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest

from l4jax import serve
from l4jax.engine.arguments import make_engine_config, parse_count
from l4jax.server.flags import make_generation_changes, make_options, parse
from tests.server.servers import Process


@pytest.fixture(autouse=True)
def loggers_are_restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("l4jax", "uvicorn")]
    kept = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, kept, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_flags_of_vllm_have_the_same_meaning(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    args = parse(
        [
            *("meta-llama/Llama-4", "--host", "127.0.0.1", "--port", "9", "--api-key", "a", "b"),
            *("--served-model-name", "one", "two", "--max-model-len", "128K", "-tp", "4"),
            *("--data-parallel-size", "2", "--max-num-seqs", "16", "--no-enable-prefix-caching"),
            *("--max-num-batched-tokens", "4k", "--kv-cache-dtype", "fp8", "--block-size", "64"),
            *("--limit-mm-per-prompt", '{"image": 3}', "--chat-template", str(template)),
            *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}'),
            *("--override-generation-config", '{"temperature": 0.1, "max_new_tokens": 9}'),
            *("--allowed-media-domains", "Pictures.example", "--tool-call-parser"),
            *("llama4_pythonic", "--enable-auto-tool-choice", "--allowed-origins", '["*"]'),
            *("--gpu-memory-utilization", "0.5", "--quantization", "fp8", "--seed", "7"),
            *("--lora", "adapter"),
        ]
    )
    engine = make_engine_config(args)
    assert engine.model == "meta-llama/Llama-4" and engine.mesh_shape == "2x4"
    assert engine.max_model_len == 131_072 and engine.max_num_batched_tokens == 4000
    assert engine.enable_prefix_caching is False and engine.max_num_seqs == 16
    assert engine.speculative_config == {"method": "ngram", "num_speculative_tokens": 4}
    assert engine.limit_mm_per_prompt == {"image": 3} and engine.block_size == 64
    assert engine.chat_template == "{{ messages }}" and engine.kv_cache_dtype == "fp8"
    assert engine.quantization == "fp8" and engine.seed == 7
    assert engine.gpu_memory_utilization == 0.5 and engine.lora == "adapter"
    options = make_options(args)
    assert options.served_model_names == ("one", "two") and options.api_keys == ("a", "b")
    assert (options.host, options.port, options.max_new_tokens) == ("127.0.0.1", 9, 9)
    assert options.media.domains == ("pictures.example",) and options.allowed_origins == ("*",)
    assert make_generation_changes(args) == {"temperature": 0.1}


def test_defaults_are_vllms_and_the_bundled_model():
    args = parse([])
    options, engine = make_options(args), make_engine_config(args)
    assert (options.host, options.port) == ("0.0.0.0", 8000)
    assert engine.model is None and engine.mesh_shape == "1x1"
    assert options.served_model_names == ("l4jax-tiny",)
    assert engine.enable_prefix_caching is True and engine.max_images == 10
    assert engine.max_num_seqs == 64 and engine.max_model_len is None
    named = make_engine_config(parse(["--mesh", "data=2,model=4"]))
    assert named.mesh_shape == "data=2,model=4"
    assert make_engine_config(parse(["--limit-mm-per-prompt", "image=3"])).max_images == 3


def test_an_api_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("L4JAX_API_KEY", "secret")
    assert make_options(parse([])).api_keys == ("secret",)
    assert make_options(parse(["--api-key", "other"])).api_keys == ("other",)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1k", 1000), ("1K", 1024), ("25.6k", 25_600), ("1M", 2**20), ("10m", 10**7)],
)
def test_counts_are_parsed_as_in_vllm(text, size):
    assert parse_count(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5", "1.0001k", "1 k", "1T", "many"])
def test_an_invalid_count_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a count"):
        parse_count(text)


@pytest.mark.parametrize(
    ("words", "length", "tuned"),
    [
        ("Llama-4-Scout-17B-16E-Instruct --max-model-len 1000000", 1_000_000, True),
        ("Llama-4-Maverick-17B-128E-Instruct-FP8 --max-model-len 430000", 430_000, True),
        ("Llama-4-Scout-17B-16E-Instruct --max-model-len 3600000", 3_600_000, False),
    ],
)
def test_commands_with_the_temperature_as_a_generation_config_mean_the_same(words, length, tuned):
    """As in the announcement of Llama 4 in vLLM, where the key switches the temperature of global
    layers."""
    value = str(tuned).lower()
    override = f'--override-generation-config={{"attn_temperature_tuning": {value}}}'
    args = parse([*f"meta-llama/{words} --tensor-parallel-size 8".split(), override])
    engine = make_engine_config(args)
    assert engine.max_model_len == length and engine.mesh_shape == "1x8"
    assert engine.attn_temperature_tuning is tuned
    assert make_generation_changes(args) == {}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-waiting", "-1"], "--max-waiting is -1"),
        (["--api-key", ""], "--api-key is empty"),
        (["--request-timeout", "0"], "--request-timeout is 0"),
        (["--ssl-keyfile", "key.pem"], "come together"),
        (["--allowed-local-media-path", "nowhere"], "'nowhere'"),
        (["--override-generation-config", '{"warmth": 1}'], "'warmth'"),
        (["--override-generation-config", '{"max_new_tokens": 0}'], "max_new_tokens is 0"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_invalid_options_give_one_line_and_exit_code_1(words, says, capsys):
    assert serve.main(words) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("l4jax.serve: ") and says in lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "--model", "b"], "named twice"),
        (["--mesh", "8", "-tp", "8"], "two spellings"),
        (
            ["--override-generation-config", '{"attn_temperature_tuning": 4}'],
            "attn_temperature_tuning is 4: it is true or false",
        ),
        (
            [
                *("--attn-temperature-tuning", "off"),
                *("--override-generation-config", '{"attn_temperature_tuning": true}'),
            ],
            "contradict each other",
        ),
        (["--max-model-len", "many"], "is not a count"),
        (["--allowed-origins", "a"], "is not JSON"),
        (["--limit-mm-per-prompt", "image"], "is not JSON"),
    ],
)
def test_contradicting_flags_are_refused_by_the_parser(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(words)
    assert says in capsys.readouterr().err


def test_help_states_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    text = capsys.readouterr().out
    assert text.count("(default: ") > 30


@pytest.fixture
def start(tmp_path) -> Iterator:
    started: list[Process] = []

    def start(*words: str) -> Process:
        small = ("--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "32")
        started.append(Process(tmp_path, *small, *words))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.mark.slow
def test_sigterm_finishes_or_aborts_requests_and_exits_with_0(start):
    server = start("--shutdown-timeout", "1")
    server.wait_for("/ready")
    body = {"prompt": "The sky", "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 2}
    chunks: list[str] = []

    def read() -> None:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            chunks.extend(line for line in stream.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    while not chunks and reader.is_alive():
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    reader.join(30)
    assert chunks[-1] == "data: [DONE]"
    events = [record["event"] for record in server.read_log()]  # each line is JSON
    assert events[-1] == "stopped" and "listening" in events and "ready" in events
    assert any("the tiny Llama 4 that comes with l4jax" in event for event in events)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(server.url + "/health")


@pytest.mark.slow
def test_sigterm_during_compilation_exits_with_0(start):
    server = start("--shutdown-timeout", "0")
    server.wait_for("/health")  # alive before it is ready
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
