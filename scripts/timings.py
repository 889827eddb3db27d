"""Print how long the commands take on this machine, beside the figures of an earlier run.

    python -m scripts.timings [--write]

No figure fails a check: other processes on the machine change them.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STORED = Path(__file__).with_suffix(".json")
REQUESTS, TOKENS = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how long the commands take here.")
    parser.add_argument("--write", action="store_true", help=f"store the figures in {STORED.name}")
    args = parser.parse_args()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    machine = f"{len(os.sched_getaffinity(0))} cores, Python {sys.version.split()[0]}"
    print(f"{'':50}{'now':>10}{'earlier':>10}  ({stored.get('machine')})")
    found: dict[str, float | str] = {"machine": machine}
    with tempfile.TemporaryDirectory() as cache:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "NPROC", "XLA_"))}
        environment = {**kept, "L4JAX_CACHE": cache, "JAX_PLATFORMS": "cpu"}
        for name, figure in (*measure_generate(environment), *measure_server(environment)):
            found[name] = float(f"{figure:.3g}")
            print(f"{name:50}{found[name]:>10}{stored.get(name, '-'):>10}", flush=True)
    if args.write:
        STORED.write_text(json.dumps(found, indent=2) + "\n")


def measure_generate(environment: dict[str, str]) -> Iterator[tuple[str, float]]:
    """Run the README's first command twice; nothing is compiled before the first run."""
    command = [sys.executable, "-m", "l4jax.generate", "--mesh", "8"]
    for run in ("first", "second"):
        began, pipe = time.perf_counter(), subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe) as process:
            assert process.stdout and os.read(process.stdout.fileno(), 1)
            yield f"generate, {run} run: s to the first text", time.perf_counter() - began
            process.communicate()


def measure_server(environment: dict[str, str]) -> Iterator[tuple[str, float]]:
    """Serve the bundled model: throughput of requests together, and latency under load."""
    with serve(environment) as url, ThreadPoolExecutor(REQUESTS) as pool:
        urls = [url] * REQUESTS
        for name, run_all in (("one by one", map), ("together", pool.map)):
            list(run_all(complete, urls))  # compiles
            began = time.perf_counter()
            latency = statistics.median(run_all(complete, urls))
            seconds = time.perf_counter() - began
            yield f"serve, {REQUESTS} requests {name}: tokens/s", REQUESTS * TOKENS / seconds
            yield f"serve, {REQUESTS} requests {name}: s to the first text", latency


@contextlib.contextmanager
def serve(environment: dict[str, str]) -> Iterator[str]:
    """The URL of a server process that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["--host", "127.0.0.1", "--port", port, "--max-model-len", "256"]
    words += ["--max-num-seqs", str(REQUESTS), "--max-num-batched-tokens", "256"]
    command = [sys.executable, "-m", "l4jax.serve", *words]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                with contextlib.suppress(urllib.error.URLError):  # refused, or 503: not ready
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=60)
                    break
                assert process.poll() is None, "the server does not start"
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def complete(url: str) -> float:
    """Stream one completion of `TOKENS` tokens; the seconds to its first text."""
    body = {"prompt": "The sky", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as response:
        response.readline()
        first = time.perf_counter() - began
        response.read()
    return first


if __name__ == "__main__":
    main()
