"""Training metrics: JSON lines, and a plot of the curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE, CURVES = "metrics.jsonl", "curves.svg"
_WIDTH, _HEIGHT, _EDGE = 720, 200, 36
_CURVES = ("words", "right", "balance", "rate")


class Metrics:
    """Writes a run's metrics, averaged over the steps of a line."""

    def __init__(self, folder: Path, start: int):
        """Keep the lines up to step `start`; a resumed run writes the later ones again."""
        self._path = folder / FILE
        kept = [line for line in read_lines(folder) if line["step"] <= start]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, metrics: Sequence[Mapping[str, Any]], **more: float) -> None:
        """Append a line for the steps up to `step`, from the metrics of each step."""
        line: dict[str, Any] = {"step": step, **more}
        for name in metrics[0]:
            values = [np.asarray(its[name], np.float64) for its in metrics]
            # A batch without examples of a kind has the accuracy 0 / 0.
            known = [value for value in values if not np.isnan(value).all()]
            line[name] = np.mean(known, 0).tolist() if known else None
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run; skip a last line that a kill truncated."""
    path = folder / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_curves(folder: Path) -> None:
    """Plot the curves of a run as SVG, one panel below the other."""
    lines = read_lines(folder)
    panels = [
        _draw_panel(name, [(x["step"], x[name]) for x in lines if name in x], at * _HEIGHT)
        for at, name in enumerate(_CURVES)
    ]
    size = f'width="{_WIDTH}" height="{_HEIGHT * len(_CURVES)}"'
    style = 'font-family="sans-serif" font-size="12" fill="none" stroke="none"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    background = '<rect width="100%" height="100%" fill="white"/>'
    (folder / CURVES).write_text("\n".join([head, background, *panels, "</svg>"]) + "\n")


def _draw_panel(name: str, points: Sequence[tuple[int, float]], top: int) -> str:
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return ""
    (left, right), (low, high) = (
        (min(values), max(values)) for values in zip(*points, strict=True)
    )

    def project(x: float, y: float) -> str:
        across = _EDGE + (_WIDTH - 2 * _EDGE) * (x - left) / max(right - left, 1)
        down = top + _HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * (y - low) / max(high - low, 1e-12)
        return f"{across:.1f},{down:.1f}"

    line = f'<polyline stroke="#1f54c8" points="{" ".join(project(x, y) for x, y in points)}"/>'
    text = f"{name}: {low:.4g} to {high:.4g}, last {points[-1][1]:.4g}; steps {left} to {right}"
    return f'<text x="{_EDGE}" y="{top + 20}" fill="black">{text}</text>\n{line}'
