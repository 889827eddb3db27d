"""Figures as a table, as JSON, and as a plot with those of another engine. No jax."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4jax.benchmark.cost import Cost

# vLLM 0.25.1 on one H200: Scout's layer shapes, random weights, CUDA graphs, greedy, prompts of 256
# tokens. Milliseconds of a decode step by batch; int4 leaves attention in bfloat16.
PEER = "vLLM 0.25.1"
PEER_CONTEXT = 256  # tokens
PEER_DECODE = {
    (48, "fp8"): {1: 9.69, 8: 16.45, 32: 28.30, 128: 35.27},
    (48, "int4"): {1: 13.06, 8: 34.88, 32: 63.17, 128: 129.1},
    (24, None): {1: 6.39, 8: 12.89, 32: 23.40, 128: 29.30},
}

_COLUMNS = ("kind", "batch", "context", "ms", "tokens/s", "GB", "GFLOP", "floor ms", "of floor")
_WIDTHS = (10, 5, 7, 9, 8, 7, 8, 8, 8)
_OURS, _THEIRS, _FLOOR, _INK, _GRID = "#1f5fbf", "#d9822b", "#7a7f87", "#24292f", "#e1e4e8"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        kind: "decode", "prefill" or "throughput".
        batch: rows, or requests.
        context: tokens of a row before the first step, or of a prompt.
        seconds: of a step, of a prompt, or of all requests.
        tokens: output tokens; of a prefill, prompt tokens.
        bytes, flops, floor_seconds: the least cost; None for a mix of requests, which has no model.
    """

    kind: str
    batch: int
    context: int
    seconds: float
    tokens: int
    bytes: float | None = None
    flops: float | None = None
    floor_seconds: float | None = None

    @classmethod
    def with_cost(
        cls, kind: str, batch: int, context: int, seconds: float, tokens: int, cost: Cost
    ) -> "Figure":
        """Make a figure with its least cost."""
        flops = sum(cost.flops.values())
        return cls(kind, batch, context, seconds, tokens, cost.bytes, flops, cost.seconds)


@dataclasses.dataclass(frozen=True)
class Results:
    """Figures of one model on one device.

    Attributes:
        about: config, layers, quantization, format, kernels, device and version of jax.
        figures: in the order of measuring.
        start: seconds of each phase of the start.
    """

    about: dict[str, Any]
    figures: list[Figure]
    start: dict[str, float]


def format_results(results: Results) -> str:
    """Format all results as a table."""
    lines = map(format_figure, results.figures)
    return "\n".join((format_header(results), *lines, format_start(results)))


def format_header(results: Results) -> str:
    """Format the description of the model, and the names of the columns."""
    about = {key: value for key, value in results.about.items() if key != "quantization"}
    return ", ".join(f"{key} {value}" for key, value in about.items()) + "\n" + _align(_COLUMNS)


def format_figure(figure: Figure) -> str:
    """Format one line of the table."""
    f, ms = figure, figure.seconds * 1e3
    cost = ("", "", "", "")
    if f.bytes is not None and f.flops is not None and f.floor_seconds is not None:
        share = f"{f.floor_seconds / f.seconds:.0%}"
        floor_ms = f"{f.floor_seconds * 1e3:.3g}"
        cost = (f"{f.bytes / 1e9:.3g}", f"{f.flops / 1e9:.4g}", floor_ms, share)
    rate = f"{f.tokens / f.seconds:,.0f}"
    return _align((f.kind, str(f.batch), str(f.context), f"{ms:.4g}", rate, *cost))


def format_start(results: Results) -> str:
    """Format the seconds of the start."""
    parts = (f"{name} {seconds:.1f} s" for name, seconds in results.start.items())
    return "Start: " + ", ".join(parts)


def _align(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def write_json(path: Path, results: Results) -> None:
    """Write results; figures are in seconds, bytes and FLOP."""
    rows = [dataclasses.asdict(figure) for figure in results.figures]
    content = {**results.about, "start": results.start, "figures": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Results:
    """Read what `write_json` wrote; ValueError for any other file."""
    try:
        about = json.loads(path.read_text())
        start, rows = about.pop("start"), about.pop("figures")
        return Results(about, [Figure(**row) for row in rows], start)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file that --json wrote: {error!r}.") from error


def draw_plot(path: Path, results: Results) -> None:
    """Plot milliseconds of a decode step against batch, with the floor.

    vLLM's figures are in it where they exist: for Scout with as many layers in the same format.
    The suffix of the path names the format. Needs matplotlib (`pip install "l4jax[bench]"`).

    Raises:
        ValueError: there is no decode figure, or matplotlib does not write this format.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    about = results.about
    decode = sorted((f for f in results.figures if f.kind == "decode"), key=lambda f: f.batch)
    if not decode:
        raise ValueError("--plot needs figures of decode: give --decode rows and tokens.")
    contexts = sorted({f.context for f in decode})
    peer = PEER_DECODE.get((about["layers"], about["quantization"]), {})
    if about["config"] != "scout" or PEER_CONTEXT not in contexts:
        peer = {}
    settings: dict[Any, Any] = {
        "font.size": 12,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "svg.hashsalt": "l4jax",  # the same file from the same figures
    }
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(8, 4.5), dpi=150, layout="constrained", facecolor="white")
        axes = canvas.subplots()
        if peer:
            label = f"{PEER}, {PEER_CONTEXT} tokens of context"
            _draw_line(axes, list(peer.items()), _THEIRS, "s", label, above=True)
        for number, context in enumerate(contexts):
            line = [f for f in decode if f.context == context]
            points = [(f.batch, f.seconds * 1e3) for f in line]
            label = f"l4jax, {context:,} tokens of context"
            shade = 1 - 0.6 * number / len(contexts)
            _draw_line(axes, points, _OURS, "o", label, above=not peer, alpha=shade)
            floor = [(f.batch, f.floor_seconds * 1e3) for f in line if f.floor_seconds is not None]
            label = "floor: weights and cache read once" if number == 0 else None
            axes.plot(*zip(*floor, strict=True), ":", color=_FLOOR, linewidth=2, label=label)
        _style_axes(axes, sorted({f.batch for f in decode} | set(peer)))
        device = about.get("device", "")
        axes.set_title(
            f"Decode step: {about['config'].capitalize()}, {about['layers']} layers, "
            f"{about['format']}, {device}",
            loc="left",
            fontweight="bold",
            fontsize=12.5,
        )
        metadata = {"Date": None} if path.suffix == ".svg" else None
        canvas.savefig(path, metadata=metadata)


def _draw_line(
    axes: Any,
    points: Sequence[tuple[int, float]],
    color: str,
    marker: str,
    label: str,
    *,
    above: bool,
    alpha: float = 1.0,
) -> None:
    """Draw a line with a number at each point, above it or at its lower right."""
    from matplotlib.patheffects import withStroke

    batches, milliseconds = zip(*points, strict=True)
    style = {"color": color, "marker": marker, "markersize": 7, "linewidth": 2.2, "alpha": alpha}
    axes.plot(batches, milliseconds, label=label, **style)
    for batch, ms in points:
        axes.annotate(
            f"{ms * (1 + 1e-9):.3g}",  # 16.45 is 16.5, whatever its binary value
            (batch, ms),
            xytext=(0, 9) if above else (9, -15),
            textcoords="offset points",
            ha="center" if above else "left",
            color=color,
            fontsize=10.5,
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )


def _style_axes(axes: Any, batches: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set(xscale="log", yscale="log", xlabel="batch (rows)", ylabel="ms per decode step")
    axes.set_xticks(batches, labels=[str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.06, y=0.14)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FLOOR)
    axes.legend(frameon=False, loc="upper left")
