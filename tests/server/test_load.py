"""Many clients at once: all are served, disconnects leave no request."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest

from tests.server.fake_engine import wait_until
from tests.server.servers import ASK, LONG_SECONDS, MODEL, make_llm, run_server

CLIENTS, KILLED, TOGETHER = 64, 20, 16
REQUESTS, GROWTH = 500, 4 * 2**20  # bytes: noise of the allocators, of more than 1 GB
ROUNDS = 4  # until one is flat; a leak grows in each round


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llm = make_llm(folder, max_num_seqs=TOGETHER)
    with run_server(llm, max_waiting=CLIENTS) as running:
        yield running
        running.wait_idle()


def ask(number: int, **options):
    extra = {"ignore_eos": True}
    given = {"model": MODEL, "messages": ASK, "max_tokens": 40, "seed": number, "temperature": 1.0}
    return {**given, **options, "extra_body": extra}


def stream(client: openai.OpenAI, number: int, is_killed: bool) -> str | None:
    """Return the text of a stream; None if the client disconnects after the first text."""
    text = ""
    with client.chat.completions.create(**ask(number, stream=True)) as events:
        for chunk in events:
            text += chunk.choices[0].delta.content or ""
            if is_killed and text:
                return None  # and the connection is closed
    assert chunk.choices[0].finish_reason == "length"
    return text


@pytest.mark.slow
def test_sixty_four_concurrent_streams_are_served_and_twenty_disconnects_leave_nothing(server):
    # Threads and not coroutines: an abandoned asynchronous generator waits for the garbage
    # collector, which may run in a thread of the server while the generator runs.
    with server.client() as client, ThreadPoolExecutor(CLIENTS) as together:
        futures = [together.submit(stream, client, n, n < KILLED) for n in range(CLIENTS)]
        texts = [future.result() for future in futures]
    assert texts[:KILLED] == [None] * KILLED and all(texts[KILLED:])
    server.wait_idle()
    assert server.service.loop.stats.pages_used == 0
    with server.client() as client:  # each output equals that of batch size 1
        for number in (KILLED, CLIENTS - 1):
            single = client.chat.completions.create(**ask(number)).choices[0].message.content
            assert single == texts[number]


def read_memory() -> int:
    """Return the resident bytes of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_constant_over_hundreds_of_requests(server):
    with httpx2.Client(timeout=LONG_SECONDS) as client, ThreadPoolExecutor(TOGETHER) as pool:

        def run(number: int) -> None:
            body = {"prompt": [5, number % 256, 7], "max_tokens": 3, "seed": number}
            body |= {"stream": number % 2 == 0, "logprobs": number % 3 or None}
            answer = client.post(f"{server.url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text

        def run_all(count: int) -> int:
            list(pool.map(run, range(count)))
            wait_until(lambda: not server.service.loop.count_in_flight())
            return read_memory()

        sizes = [run_all(REQUESTS)]  # creates all threads and connections
        while len(sizes) <= ROUNDS:
            sizes.append(run_all(REQUESTS))
            if sizes[-1] - sizes[-2] < GROWTH:
                return
    pytest.fail(f"MiB, {REQUESTS} requests apart: {[size // 2**20 for size in sizes]}")
