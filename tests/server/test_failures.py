"""Failures get an error message, affect no other request, and leave no request behind."""

import json
import logging
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from l4jax.server.logs import JsonLines
from tests.server.fake_engine import is_idle, make_fake_llm, wait_until
from tests.server.servers import ASK, MODEL, run_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SECRET = "the secret of the prompt"


@pytest.fixture
def fake_llm(tmp_path):
    return make_fake_llm(tmp_path)


@pytest.fixture
def server(fake_llm):
    with run_server(fake_llm, max_waiting=1) as running:
        yield running
        fake_llm.engine.pace.set()
        wait_until(lambda: is_idle(running.service.loop))
        assert fake_llm.engine.threads == {"engine"}  # no other thread called it


def ask(**options):
    return {"model": MODEL, "messages": ASK, "max_tokens": 5, **options}


def read_error(response: httpx2.Response) -> dict:
    """Return the error of a response in OpenAI's format."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) > 10
    return body["error"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"{", None, "not JSON"),
        (b"", None, "JSON object"),
        (b"[1]", None, "JSON object"),
        (b'"a"', None, "JSON object"),
        (b'{"a": ' + b"[" * 100_000, None, "nested too deep"),
        (b'{"temperature": NaN}', None, "NaN"),
        (b'{"temperature": -Infinity}', None, "-Infinity"),
        (b'{"messages": [], "temperature": 1e999}', "temperature", "finite"),
        (b'{"max_tokens": "5"}', "messages", "required"),
        (b"\xff\xfe", None, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages", "surrogate"),
        (b'{"messages": [5]}', "messages[0]", "dictionary"),
        (b'{"messages": [{"role": "user", "content": "a"}], "stop": [5]}', "stop", "string"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "top_k": 99999999999}',
            "top_k",
            "less",
        ),
    ],
)
def test_an_invalid_body_is_refused_with_its_field(server, body, param, says):
    headers = {"Content-Type": "application/json"}
    response = server.post(CHAT, content=body, headers=headers)
    assert response.status_code == 400
    error = read_error(response)
    assert says in error["message"] and error["param"] == param, error


def test_the_first_requests_may_be_concurrent(tmp_path):
    """In its own process: the template renderer is imported once per process."""
    code = f"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.server.test_failures import CHAT, ask
from tests.server.servers import run_server
from tests.server.fake_engine import make_fake_llm
with run_server(make_fake_llm(Path({str(tmp_path)!r}), 8)) as server, ThreadPoolExecutor(8) as pool:
    futures = [pool.submit(server.post, CHAT, ask()) for _ in range(8)]
    print({{future.result().status_code for future in futures}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["{200}"], done.stdout + done.stderr


def test_overlong_prompts_are_refused(server):
    response = server.post(COMPLETIONS, {"model": MODEL, "prompt": [5] * 501})
    assert response.status_code == 400 and "too long" in read_error(response)["message"]
    assert read_error(response)["param"] == "prompt"
    several = server.post(COMPLETIONS, {"model": MODEL, "prompt": [[5], [5] * 501]})
    assert several.status_code == 400  # and the first prompt is not run: see the fixture


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
    ],
)
def test_unknown_paths_and_methods_get_openais_error_format(server, method, path, status):
    response = httpx2.request(method, server.url + path)
    assert response.status_code == status
    assert path in read_error(response)["message"]
    assert response.headers["x-request-id"]


def test_a_full_server_refuses_with_retry_after_and_recovers(server, fake_llm):
    fake_llm.engine.pace.clear()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(server.post, CHAT, ask()) for _ in range(3)]
        wait_until(lambda: server.service.loop.count_in_flight() == 3)
        refused = server.post(CHAT, ask())
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert read_error(refused)["type"] == "rate_limit_error"
        assert server.get("/health").status_code == 200
        fake_llm.engine.pace.set()
        assert [future.result().status_code for future in futures] == [200] * 3
    assert server.post(CHAT, ask()).status_code == 200
    assert server.post(CHAT, ask(n=4)).status_code == 400  # never fits


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_aborts_the_request(server, fake_llm, stream):
    fake_llm.engine.pace.clear()
    body = json.dumps(ask(stream=stream, n=2)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        wait_until(lambda: server.service.loop.stats.running == 2)
        if stream:
            assert connection.recv(100)
    wait_until(lambda: len(fake_llm.engine.cancelled) == 2)
    wait_until(lambda: is_idle(server.service.loop))


def test_a_failed_step_fails_its_requests_only(server, fake_llm):
    fake_llm.engine.failure = RuntimeError("out of memory")
    response = server.post(CHAT, ask())
    assert response.status_code == 500 and read_error(response)["type"] == "server_error"
    assert "out of memory" not in response.text
    fake_llm.engine.failure = RuntimeError("out of memory")
    lines = server.post(CHAT, ask(stream=True)).text.strip().split("\n\n")
    error = json.loads(lines[-2].removeprefix("data: "))
    assert error["error"]["type"] == "server_error" and lines[-1] == "data: [DONE]"
    assert server.post(CHAT, ask()).json()["choices"][0]["message"]["content"] == "aaaaa"


def test_a_dead_engine_fails_the_health_check(server, fake_llm):
    def fail(*_):
        raise RuntimeError("broken")

    fake_llm.engine.stats = fail
    server.post(CHAT, ask())
    wait_until(lambda: server.get("/health").status_code == 503)
    assert read_error(server.get("/ready"))["code"] == "not_ready"
    assert server.post(CHAT, ask()).status_code == 503


def test_a_request_beyond_the_timeout_gets_504(fake_llm):
    fake_llm.engine.pace.clear()
    with run_server(fake_llm, request_timeout=0.1) as server:
        response = server.post(CHAT, ask())
        assert response.status_code == 504 and "0.1 s" in read_error(response)["message"]
        lines = server.post(CHAT, ask(stream=True)).text.strip().split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_before_parsing(fake_llm, is_chunked):
    with run_server(fake_llm, max_request_bytes=10_000) as server:
        body = json.dumps(ask(user="a" * 10_000)).encode()
        content = iter([body[:9000], body[9000:]]) if is_chunked else body
        headers = {"Content-Type": "application/json"}
        response = server.post(CHAT, content=content, headers=headers)
        assert response.status_code == 413
        assert "--max-request-bytes" in read_error(response)["message"]
        assert server.post(CHAT, ask(user="a" * 5000)).status_code == 200


def test_api_keys_protect_the_api_and_not_the_probes(fake_llm):
    with run_server(fake_llm, api_keys=("first", "sécond")) as server:
        for key in ("Bearer wrong", "Bearer", "Basic first", "first", ""):
            headers = {"Authorization": key} if key else {}
            response = server.post(CHAT, ask(), headers=headers)
            assert response.status_code == 401 and read_error(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/models/tiny"):
            assert server.get(path).status_code == 401
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 401
        assert server.get("/nothing").status_code == 401
        for path in ("/", "/health", "/ready", "/metrics", "/version"):
            assert server.get(path).status_code == 200
        with server.client(api_key="first") as client:
            assert client.chat.completions.create(**ask()).choices[0].message.content == "aaaaa"


def test_shutdown_finishes_running_requests_and_refuses_new_ones(fake_llm):
    fake_llm.engine.pace.clear()
    with ThreadPoolExecutor(2) as pool:
        with run_server(fake_llm, shutdown_timeout=30) as server:
            future = pool.submit(server.post, CHAT, ask())
            wait_until(lambda: server.service.loop.stats.running == 1)
            server.service.loop.drain()
            refused = server.post(CHAT, ask())
            assert refused.status_code == 503 and "shutting down" in refused.text
            assert server.get("/ready").status_code == 503
            threading.Timer(0.5, fake_llm.engine.pace.set).start()
        assert future.result().json()["choices"][0]["message"]["content"] == "aaaaa"


def test_shutdown_aborts_requests_after_its_timeout(fake_llm):
    fake_llm.engine.pace.clear()
    with ThreadPoolExecutor(2) as pool:
        with run_server(fake_llm, shutdown_timeout=0.2) as server:
            futures = [
                pool.submit(server.post, CHAT, ask(stream=stream)) for stream in (False, True)
            ]
            wait_until(lambda: server.service.loop.stats.running == 2)
        assert futures[0].result().status_code == 503
        assert "shutting_down" in futures[1].result().text
        assert futures[1].result().text.endswith("data: [DONE]\n\n")


def test_metrics_have_vllms_names_and_count_requests(server):
    server.post(CHAT, ask())
    assert server.read_metric("l4jax:inter_token_latency_seconds_count") == 4
    server.post(CHAT, ask(stop="aa"))
    text = server.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "spec_decode_num_draft_tokens_total",
        "spec_decode_num_accepted_tokens_total",
    ):
        assert f'l4jax:{name}{{model_name="tiny"}}' in text, name
    assert server.read_metric("l4jax:kv_cache_usage_perc") == 0.5
    assert server.read_metric("l4jax:time_to_first_token_seconds_count") == 2
    assert 'l4jax:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text
    assert 'l4jax:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in text


@pytest.mark.parametrize("is_logged", [False, True])
def test_the_log_contains_prompts_only_with_logs_requests(fake_llm, monkeypatch, is_logged):
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(JsonLines())
    handler.emit = lambda record: lines.append(handler.format(record))
    loggers = [logging.getLogger(name) for name in ("l4jax", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        with run_server(fake_llm, logs_requests=is_logged) as server:
            talk = [{"role": "user", "content": SECRET}]
            server.post(CHAT, ask(messages=talk))
            server.post(CHAT, ask(messages=[*talk, {"role": SECRET}]))
            server.post(CHAT, ask(messages=talk, stream=True))
            monkeypatch.setattr(server.service, "get_model", fail_with_secret)
            assert server.post(CHAT, ask(messages=talk)).status_code == 500
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
    records = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "event"} <= set(record) for record in records)
    requests = [r for r in records if r["event"] == "request" and r["path"] == CHAT]
    assert [record["status"] for record in requests] == [200, 400, 200, 500]
    assert requests[0]["completion_tokens"] == requests[2]["completion_tokens"] == 5
    assert any(record["event"] == "a request failed" for record in records)
    assert (SECRET in "".join(lines)) is is_logged


def fail_with_secret(_name):
    raise RuntimeError(f"a message with {SECRET}")


def test_cors_allows_only_the_given_origins(fake_llm):
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with run_server(fake_llm) as server:
        response = httpx2.options(server.url + CHAT, headers=headers)
        assert "access-control-allow-origin" not in response.headers
    with run_server(fake_llm, allowed_origins=("https://a.example",), api_keys=("k",)) as server:
        response = httpx2.options(server.url + CHAT, headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = {**headers, "Origin": "https://b.example"}
        response = httpx2.options(server.url + CHAT, headers=other)
        assert "access-control-allow-origin" not in response.headers
