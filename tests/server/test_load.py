"""Many clients at once: all are served, canceled requests leave nothing."""

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
REQUESTS, GROWTH = 500, 4 * 2**20  # bytes, of a gigabyte and more: what allocators do
ROUNDS = 4  # until one is flat: this process is not alone in its memory, and a leak is in each


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
    """The text of an answer; None where the client hangs up after its first words."""
    text = ""
    with client.chat.completions.create(**ask(number, stream=True)) as events:
        for chunk in events:
            text += chunk.choices[0].delta.content or ""
            if is_killed and text:
                return None  # and the connection is closed
    assert chunk.choices[0].finish_reason == "length"
    return text


@pytest.mark.slow
def test_sixty_four_streams_at_once_are_served_and_the_twenty_that_are_killed_leave_nothing(server):
    # Threads and not coroutines: an asynchronous generator that is left midway waits for the
    # garbage collector, which may come in a thread of the server's, while the generator runs.
    with server.client() as client, ThreadPoolExecutor(CLIENTS) as together:
        asked = [together.submit(stream, client, n, n < KILLED) for n in range(CLIENTS)]
        texts = [answer.result() for answer in asked]
    assert texts[:KILLED] == [None] * KILLED and all(texts[KILLED:])
    server.wait_idle()
    assert server.service.loop.stats.pages_used == 0
    with server.client() as client:  # each answer is what it is alone
        for number in (KILLED, CLIENTS - 1):
            alone = client.chat.completions.create(**ask(number)).choices[0].message.content
            assert alone == texts[number]


def read_memory() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_the_memory_is_flat_over_hundreds_of_requests(server):
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

        sizes = [run_all(REQUESTS)]  # as many threads and connections as there will ever be
        while len(sizes) <= ROUNDS:
            sizes.append(run_all(REQUESTS))
            if sizes[-1] - sizes[-2] < GROWTH:
                return
    pytest.fail(f"MiB, {REQUESTS} requests apart: {[size // 2**20 for size in sizes]}")
