"""The bench counts the cost of a step, and measures its time."""

import dataclasses
import json

import numpy as np
import pytest

from l4jax import bench, cache, config
from l4jax.benchmark import measure
from l4jax.benchmark.cost import Format, count_experts, count_step
from l4jax.config import MAVERICK, SCOUT, TINY
from l4jax.engine import kv_cache
from l4jax.engine.capacity import compute_limits
from l4jax.engine.config import EngineConfig

FP8, INT4, BF16 = Format("fp8", True), Format("int4", False), Format(None, False)


def test_a_decode_step_of_scout_reads_its_weights_once():
    # By hand: 48 layers of attention, the shared and one expert, and the head in bfloat16.
    attention = 5120 * 128 * (2 * 40 + 2 * 8)
    expert = 3 * 5120 * 8192
    wanted = 48 * (attention + 2 * expert) + 2 * 202048 * 5120
    assert count_step(SCOUT.text, FP8, [1]).bytes == pytest.approx(wanted, rel=1e-3)
    assert count_step(SCOUT.text, FP8, [1]).seconds == pytest.approx(4.0e-3, rel=0.01)


def test_selected_experts_are_counted_once_per_step():
    assert count_experts(16, 1) == 1
    assert count_experts(16, 8) == pytest.approx(6.5, abs=0.1)
    assert count_experts(16, 10000) == pytest.approx(16)


def test_smaller_formats_read_fewer_bytes():
    costs = [count_step(SCOUT.text, form, [256] * 8).bytes for form in (INT4, FP8, BF16)]
    assert costs == sorted(costs)


def test_local_layers_read_only_their_chunk_of_the_cache():
    def count_cache(context: int) -> float:
        return (
            count_step(SCOUT.text, BF16, [context]).bytes - count_step(SCOUT.text, BF16, [1]).bytes
        )

    position = 2 * 2 * 8 * 128  # bytes of one, keys and values of a layer
    chunk = SCOUT.text.chunk
    assert count_cache(chunk) == 48 * (chunk - 1) * position
    assert count_cache(chunk + 1) == 12 * chunk * position  # the first of a new chunk


def test_dense_layers_of_maverick_are_counted_without_experts():
    assert (
        count_step(MAVERICK.text, BF16, [1]).bytes < count_step(SCOUT.text, BF16, [1]).bytes * 1.1
    )


def test_a_prompt_is_counted_token_by_token():
    cost = count_step(TINY.text, BF16, [40], tokens=40)
    parts = [count_step(TINY.text, BF16, [at + 1]) for at in range(40)]
    head = 2 * TINY.text.vocab * TINY.text.width
    flops = sum(part.flops["bfloat16"] for part in parts) - 39 * head
    assert cost.flops["bfloat16"] == pytest.approx(flops)


@pytest.mark.slow
def test_figures_are_printed_written_plotted_and_read_back(tmp_path, capsys, monkeypatch):
    # A model with vision: the first token of the first prompt is the image placeholder.
    (first, *_) = np.random.default_rng(0).integers(0, TINY.text.vocab, 4)
    monkeypatch.setattr(config, "TINY", dataclasses.replace(TINY, patch_id=int(first)))
    files = {name: tmp_path / f"out.{name}" for name in ("json", "png", "svg")}
    words = "--decode 1x8 3x40 --steps 2 --prefill 32 --requests 3 --input-len 4 9 --output-len 2 5"
    words += " --max-num-seqs 3 --max-num-batched-tokens 32"
    words += f" --json {files['json']} --plot {files['png']}"
    assert bench.main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [
        "decode",
        "decode",
        "prefill",
        "throughput",
    ]
    written = json.loads(files["json"].read_text())
    assert set(written["start"]) == {"load", "compile", "warm-up"}
    assert [figure["context"] for figure in written["figures"]][:3] == [8, 40, 32]
    assert all(figure["seconds"] > 0 for figure in written["figures"])
    assert 6 <= written["figures"][-1]["tokens"] <= 15
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    again = ["--from-json", str(files["json"]), "--plot", str(files["svg"])]
    assert bench.main(again) == 0
    assert capsys.readouterr().out.splitlines() == lines
    first = files["svg"].read_bytes()
    assert b"</svg>" in first
    assert bench.main(again) == 0 and files["svg"].read_bytes() == first


@pytest.mark.parametrize("rows, pages, longest", [(1, 13, 320), (3, 13, 32), (3, 10000, 500)])
def test_max_is_the_longest_context_that_fits_in_memory(monkeypatch, rows, pages, longest):
    short = TINY.replace_text(max_positions=500)
    monkeypatch.setattr(
        kv_cache,
        "CPU_POOL_BYTES",
        pages * cache.count_page_bytes(TINY.text, 32, np.dtype(np.float32)),
    )
    made = measure.Bench(short, EngineConfig(dtype="float32"))
    assert made.measure_decode(rows, None, 2).context == longest - 2
    if rows == 1:
        assert made.runner.limits.max_length == longest  # equals the planned limit
    if longest < 500:
        with pytest.raises(ValueError, match=r"fit|give"):
            made.measure_decode(rows, longest - 1, 2)


def test_the_longest_request_fills_the_pages():
    groups, chunk, page = 3, 64, 16
    engine_config = EngineConfig(max_model_len=10000, max_num_seqs=1, block_size=page)
    chunked = TINY.replace_text(chunk=chunk)
    limits = compute_limits(chunked, engine_config, 1, 1, 10**6)

    def count(length: int) -> int:
        return length // page + groups * min(length, chunk) // page

    for pages in range(60):
        longest = limits.geometry.find_longest(pages, limits.max_length)
        assert count(longest) <= pages < count(longest + page)


@pytest.mark.parametrize("pair", ["8", "x256", "0x256", "8x256x1", "8xmin"])
def test_an_invalid_decode_pair_is_refused(pair, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--decode", pair])
    assert "rows x tokens" in capsys.readouterr().err


def test_a_prompt_length_that_is_no_multiple_of_a_step_is_refused(capsys):
    assert bench.main(["--decode", "--prefill", "33"]) == 1
    assert "--prefill 33" in capsys.readouterr().err
