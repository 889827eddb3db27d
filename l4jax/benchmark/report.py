"""Figures as a table, as JSON, and as a plot beside those of another engine."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4jax.benchmark.measure import Figure

# vLLM 0.25.1 on one H200: Scout's layer shapes, random weights, CUDA graphs, greedy, prompts of 256
# tokens. Milliseconds of a decode step by batch; int4 leaves attention in bfloat16.
PEER = "vLLM 0.25.1"
PEER_DECODE = {
    (48, "fp8"): {1: 9.69, 8: 16.45, 32: 28.30, 128: 35.27},
    (48, "int4"): {1: 13.06, 8: 34.88, 32: 63.17, 128: 129.1},
    (24, None): {1: 6.39, 8: 12.89, 32: 23.40, 128: 29.30},
}

_COLUMNS = ("what", "batch", "context", "ms", "tokens/s", "GB", "GFLOP", "floor ms", "of floor")


_WIDTHS = (10, 5, 7, 9, 8, 7, 8, 8, 8)


def format_head() -> str:
    """The names of the table's columns."""
    return _align(_COLUMNS)


def format_line(figure: Figure) -> str:
    """A line of the table."""
    return _align(_list_cells(figure))


def format_start(phases: dict[str, float]) -> str:
    """What the start took."""
    return "Start: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())


def _align(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def _list_cells(figure: Figure) -> tuple[str, ...]:
    f, ms = figure, figure.seconds * 1e3
    counted = ("", "", "", "")
    if f.bytes is not None and f.flops is not None and f.floor_seconds is not None:
        share = f"{f.floor_seconds / f.seconds:.0%}"
        floor_ms = f"{f.floor_seconds * 1e3:.3g}"
        counted = (f"{f.bytes / 1e9:.3g}", f"{f.flops / 1e9:.4g}", floor_ms, share)
    rate = f"{f.tokens / f.seconds:,.0f}"
    return (f.what, str(f.batch), str(f.context), f"{ms:.4g}", rate, *counted)


def write_json(
    path: Path, about: dict[str, Any], figures: Sequence[Figure], phases: dict[str, float]
) -> None:
    """What was measured, on what, and the figures, in seconds, bytes and FLOP."""
    rows = [dataclasses.asdict(figure) for figure in figures]
    path.write_text(json.dumps({**about, "start": phases, "figures": rows}, indent=1) + "\n")


def draw_plot(path: Path, about: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Milliseconds of a decode step against batch, with the floor, and the peer where it ran the
    same. Needs matplotlib (`pip install "l4jax[bench]"`).
    """
    from matplotlib.figure import Figure as Canvas

    decode = sorted((f for f in figures if f.what == "decode"), key=lambda f: (f.context, f.batch))
    canvas = Canvas(figsize=(6, 4), layout="constrained")
    axes = canvas.subplots()
    for context in sorted({f.context for f in decode}):
        line = [f for f in decode if f.context == context]
        batches = [f.batch for f in line]
        axes.plot(batches, [f.seconds * 1e3 for f in line], "o-", label=f"l4jax, {context} tokens")
        floor = [f.floor_seconds * 1e3 for f in line if f.floor_seconds is not None]
        axes.plot(batches, floor, ":", color="gray", label=f"floor, {context} tokens")
    is_scout = about["config"] == "scout"
    peer = PEER_DECODE.get((about["layers"], about["quantization"])) if is_scout else None
    if peer:
        axes.plot(list(peer), list(peer.values()), "s--", label=f"{PEER}, 256 tokens")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms a decode step")
    ticks = sorted({f.batch for f in decode})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set_title(f"{about['config']}, {about['layers']} layers, {about['format']}")
    axes.legend()
    canvas.savefig(path)
