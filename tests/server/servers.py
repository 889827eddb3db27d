"""A real server with the tiny model, on a loopback port, in a thread or a process."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
from PIL import Image

from l4jax import LLM
from l4jax.config import TINY
from l4jax.server.media import MediaReader
from l4jax.server.options import Options
from l4jax.server.run import Server
from l4jax.server.service import Service
from l4jax.testing import write_model

MODEL = "tiny"
ASK = [{"role": "user", "content": "Why is the sky blue?"}]
LONG_SECONDS = 120.0  # for calls that may compile


def make_llm(folder: Path, **options: Any) -> LLM:
    """Make the tiny model with small sizes, so that few programs are compiled."""
    if not (folder / "config.json").exists():
        write_model(folder, TINY)
    small = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(folder, dtype="float32", quiet=True, **{**small, **options})


class Running:
    """A running server, with methods to send requests."""

    def __init__(self, service: Service, port: int):
        self.service, self.url = service, f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> openai.OpenAI:
        """Make the official client."""
        given = {"api_key": "none", "max_retries": 0, "timeout": LONG_SECONDS, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        """Send a POST with JSON, or with `content`."""
        if body is not None:
            options["json"] = body
        return httpx2.post(self.url + path, timeout=LONG_SECONDS, **options)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=LONG_SECONDS)

    def read_metric(self, name: str) -> float:
        """Read a metric that has no labels but the model's."""
        lines = self.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name}{{")))

    def wait_idle(self) -> None:
        """Wait until no request runs or waits; fail after `LONG_SECONDS`."""
        until = time.monotonic() + LONG_SECONDS
        loop = self.service.loop
        while loop.count_in_flight() or loop.stats.running or loop.stats.waiting:
            assert time.monotonic() < until, f"still in flight: {loop.stats}"
            time.sleep(0.01)


@contextlib.contextmanager
def run_server(llm: LLM, media: MediaReader | None = None, **options: Any) -> Iterator[Running]:
    """Run a server in a thread until the context ends; then its threads have ended, too."""
    given = {"host": "127.0.0.1", "port": 0, "served_model_names": (MODEL,), **options}
    defaults = llm.get_default_sampling_params()
    service = Service(llm, Options(**given), defaults, media)
    server = Server(service)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        until = time.monotonic() + LONG_SECONDS
        while not (server.started and service.loop.is_ready):
            assert thread.is_alive() and time.monotonic() < until, "the server does not start"
            time.sleep(0.01)
        yield Running(service, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(LONG_SECONDS)
        assert not thread.is_alive() and not service.loop.is_running


class Process:
    """A server in its own process, started by the command.

    Args:
        folder: for its log and caches.
        words: flags.
        drops: names of environment variables that it does not inherit.
    """

    def __init__(self, folder: Path, *words: str, drops: tuple[str, ...] = ()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        kept = {key: value for key, value in os.environ.items() if key not in drops}
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "log"
        command = (sys.executable, "-m", "l4jax.serve", "--host", "127.0.0.1", "--port", str(port))
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *words],
                stderr=log,
                env={**kept, "L4JAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"},
            )

    def wait_for(self, path: str) -> None:
        """Wait until a path returns 200; fail with the log."""
        until = time.monotonic() + 2 * LONG_SECONDS
        while True:
            assert self.process.poll() is None and time.monotonic() < until, self._log.read_text()
            try:
                if httpx2.get(self.url + path).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)

    def read_log(self) -> list[dict[str, Any]]:
        """Parse its log so far, in which each line is JSON."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def make_image(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    """Make a small PNG."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def format_data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def ask_about(*urls: str, text: str = "What is it?") -> list[dict[str, Any]]:
    """Make a conversation of images and a question."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
