"""Charts drawn with Pillow, and questions about them whose answers follow from the drawn values.

Each value is printed in digits at its mark, as in most real charts, in one typeface. A picture is
the specification of an image; `draw` renders it.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from l4jax.text.image import choose_canvas

TILE, PATCH = 336, 14
# (rows, columns) of tiles -> sampling weight at full hardness.
CANVASES = {
    (1, 1): 10,
    (1, 2): 3,
    (2, 1): 2,
    (1, 3): 1,
    (3, 1): 1,
    (2, 2): 2,
    (1, 4): 1,
    (4, 1): 1,
}
PALETTE = {
    "red": (214, 39, 40),
    "blue": (31, 84, 200),
    "green": (34, 150, 60),
    "orange": (255, 140, 0),
    "purple": (125, 60, 170),
    "brown": (125, 80, 45),
    "pink": (240, 130, 190),
    "gray": (127, 127, 127),
}
INK, LINES = (20, 20, 20), (215, 215, 215)
LABELS = {
    "city": "Rome Oslo Paris Cairo Lima Delhi Tokyo Milan Kyoto Quito Seoul Dakar Bern Nice Turin",
    "fruit": "Apple Pear Plum Grape Lemon Mango Peach Melon Fig Kiwi Lime Guava Date Olive",
    "animal": "Cat Dog Horse Cow Sheep Goat Duck Goose Bear Wolf Fox Lion Tiger Mouse Frog",
    "month": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "year": "2010 2011 2012 2013 2014 2015 2016 2017 2018 2019 2020 2021 2022 2023 2024",
    "name": "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mary Nina Oscar Paul",
    "metal": "Iron Gold Zinc Tin Lead Copper Silver Nickel Cobalt",
    "drink": "Tea Coffee Milk Water Juice Cocoa Cider Soda",
}
SUBJECTS = ("Sales", "Visits", "Votes", "Points", "Orders", "Tickets", "Hours", "Boxes")
MARKS = {"bar": "bar", "row": "bar", "line": "point", "pie": "slice"}  # kind -> name of a mark
QUESTIONS = ("value", "largest", "smallest", "sum", "difference", "count", "color", "list")
# Maximum width of the text next to the marks, in letter heights: label and value; a legend.
_TEXT_WIDTHS = {"row": 6.5, "pie": 7.0}
GAP = 3  # between the two largest and the two smallest values, so that they look different


@dataclasses.dataclass(frozen=True)
class Chart:
    """The specification of a chart. Sizes in pixels; `text` is the letter height."""

    kind: str  # one of MARKS
    title: str  # empty for none
    labels: tuple[str, ...]
    values: tuple[int, ...]
    colors: tuple[str, ...]  # per mark
    has_grid: bool
    width: int
    height: int
    text: int

    @property
    def key(self) -> str:
        pairs = ", ".join(f"{x} {y}" for x, y in zip(self.labels, self.values, strict=True))
        return f"chart: {self.kind} {pairs}"


@dataclasses.dataclass(frozen=True)
class Sign:
    """The specification of an image of words and numbers, for learning to read."""

    words: tuple[str, ...]
    columns: int  # of words
    width: int
    height: int
    text: int

    @property
    def key(self) -> str:
        return f"sign: {' '.join(self.words)}"


Picture = Chart | Sign


def make_chart(rng: random.Random, hardness: float) -> Chart:
    """Make a chart; at hardness 0 with few marks in one tile, at 1 of every kind and size."""
    kind = rng.choice(list(MARKS))
    rows, columns = _choose_canvas(rng, hardness)
    width, height = _choose_size(rng, rows, columns)
    group = rng.choice(list(LABELS))
    words = LABELS[group].split()
    text = round(rng.uniform(15, 18) * (rows * columns) ** 0.5 * (0.85 if columns > 2 else 1))
    if kind in _TEXT_WIDTHS:  # leaves space for the marks
        text = min(text, round(0.6 * width / _TEXT_WIDTHS[kind]))
    space = _count_space(kind, width, height, text)
    largest = min(space, len(words), 3 + round(5 * hardness))
    count = rng.randint(min(2 + (kind == "line"), largest), largest)
    labels = rng.sample(words, count)
    if group in ("month", "year"):
        labels.sort(key=words.index)
    colors = rng.sample(list(PALETTE), count)
    if kind in ("bar", "row", "line") and rng.random() < 0.5:
        colors = [rng.choice(list(PALETTE))] * count
    title = f"{rng.choice(SUBJECTS)} by {group}" if rng.random() < 0.5 else ""
    return Chart(
        kind,
        title,
        tuple(labels),
        tuple(_choose_values(rng, count)),
        tuple(colors),
        rng.random() < 0.3,
        width,
        height,
        text,
    )


def make_sign(rng: random.Random) -> Sign:
    """Make an image of one to 24 words and numbers in a tile."""
    words = [word for group in LABELS.values() for word in group.split()]
    columns = rng.randint(1, 3)
    count = rng.randint(1, 8 * columns)
    chosen = [rng.choice(words) if rng.random() < 0.5 else str(_value(rng)) for _ in range(count)]
    width, height = _choose_size(rng, 1, 1)
    return Sign(tuple(chosen), columns, width, height, rng.randint(15, 20))


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in an image, with its left, top, right and bottom in pixels."""

    text: str
    box: tuple[float, float, float, float]


class Drawing:
    """A white image with a pen, and the texts and marks drawn on it."""

    def __init__(self, picture: Picture):
        self.image = Image.new("RGB", (picture.width, picture.height), "white")
        self.pen = ImageDraw.Draw(self.image)
        font = ImageFont.load_default(picture.text)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType: install its wheel.")
        self.font = font
        self.texts: list[Text] = []
        self.marks: list[Text] = []  # color names at the marks

    def write(self, xy: tuple[float, float], text: str, anchor: str = "la") -> None:
        """Write one line of text; `anchor` is Pillow's."""
        self.pen.text(xy, text, INK, self.font, anchor=anchor)
        self.texts.append(Text(text, self.pen.textbbox(xy, text, self.font, anchor=anchor)))

    def mark(self, box: tuple[float, float, float, float], color: str, shape: str) -> None:
        """Draw a mark in a palette color; `shape` is "rectangle" or "ellipse"."""
        getattr(self.pen, shape)(box, PALETTE[color])
        self.marks.append(Text(color, box))

    def measure(self, text: str) -> float:
        """Measure the width of a text in pixels."""
        return self.pen.textlength(text, self.font)


def draw(picture: Picture) -> Drawing:
    """Draw a picture in RGB on white; return the image with its texts and marks."""
    drawing = Drawing(picture)
    if isinstance(picture, Sign):
        _draw_sign(drawing, picture)
        return drawing
    top = 4
    if picture.title:
        drawing.write((picture.width / 2, top), picture.title, "ma")
        top += round(1.6 * picture.text)
    _DRAW[picture.kind](drawing, picture, top)
    return drawing


def make_question(chart: Chart, kind: str, rng: random.Random) -> tuple[str, str]:
    """Make a question of a kind in `QUESTIONS`, and its answer.

    Answers to sums and differences show their working and end with the result. An answer to a
    difference first repeats the values in the question's order. Without them, half of the trained
    model's answers had a wrong number as the larger one.
    """
    mark, values = MARKS[chart.kind], dict(zip(chart.labels, chart.values, strict=True))
    first, second = rng.sample(chart.labels, 2)
    ordered = sorted(values, key=values.__getitem__)
    if kind == "value":
        return f"What is the value of {first}?", str(values[first])
    if kind == "largest":
        return f"Which {mark} is the largest?", ordered[-1]
    if kind == "smallest":
        return f"Which {mark} is the smallest?", ordered[0]
    if kind == "sum":
        one, two = values[first], values[second]
        return f"What is the sum of {first} and {second}?", f"{one} + {two} = {one + two}"
    if kind == "difference":
        one, two = sorted((values[first], values[second]), reverse=True)
        question = f"What is the difference between {first} and {second}?"
        return question, f"{values[first]} and {values[second]}: {one} - {two} = {one - two}"
    if kind == "count":
        return f"How many {mark}s are there?", str(len(values))
    if kind == "color":
        if len(set(chart.colors)) == 1:
            return f"What color are the {mark}s?", chart.colors[0]
        return f"What color is {first}?", chart.colors[chart.labels.index(first)]
    assert kind == "list", kind
    return "List all values.", ", ".join(f"{label} {value}" for label, value in values.items())


def _choose_canvas(rng: random.Random, hardness: float) -> tuple[int, int]:
    if rng.random() > hardness:
        return 1, 1
    return rng.choices(list(CANVASES), list(CANVASES.values()))[0]


def _choose_size(rng: random.Random, rows: int, columns: int) -> tuple[int, int]:
    """Choose a width and height for which the image processor chooses this canvas."""
    while True:
        width, height = columns * TILE, rows * TILE
        # Most images fill the canvas: without resampling a worker is three times as fast.
        if rng.random() < 0.3:
            width = round(width * rng.uniform(0.75, 1))
            height = round(height * rng.uniform(0.75, 1))
        if choose_canvas(height, width) == (rows, columns):
            return width, height


def _count_space(kind: str, width: int, height: int, text: int) -> int:
    """Count the marks whose texts do not overlap; a label is up to 3.6 letter heights wide."""
    if kind in ("bar", "line"):
        return max(2, int((width - 20) // (3.6 * text)))
    return max(2, int((height - 3 * text) // (1.7 * text)))


def _value(rng: random.Random) -> int:
    return rng.randint(1, 99)


def _choose_values(rng: random.Random, count: int) -> list[int]:
    while True:
        values = [_value(rng) for _ in range(count)]
        ordered = sorted(values)
        if ordered[-1] - ordered[-2] >= GAP and ordered[1] - ordered[0] >= GAP:
            return values


def _draw_sign(drawing: "Drawing", sign: Sign) -> None:
    # The positions follow from the words, so a picture needs no seed.
    rng = random.Random(repr(sign))
    rows = -(-len(sign.words) // sign.columns)
    across, down = sign.width / sign.columns, sign.height / rows
    for at, word in enumerate(sign.words):
        row, column = divmod(at, sign.columns)
        x = column * across + rng.uniform(2, max(3, across - 6 - drawing.measure(word)))
        y = row * down + rng.uniform(0, max(1, down - 1.3 * sign.text))
        drawing.write((x, y), word)


def _draw_bars(drawing: "Drawing", chart: Chart, top: int) -> None:
    floor, ceiling = chart.height - 1.6 * chart.text, top + 1.4 * chart.text
    _draw_grid(drawing, chart, ceiling, floor)
    step, largest = (chart.width - 20) / len(chart.labels), max(chart.values)
    drawing.pen.line([(6, floor), (chart.width - 6, floor)], INK, 2)
    for at, (label, value, color) in enumerate(_list_marks(chart)):
        center, y = 10 + step * (at + 0.5), floor - (floor - ceiling) * value / largest
        drawing.mark((center - 0.3 * step, y, center + 0.3 * step, floor), color, "rectangle")
        drawing.write((center, y - 2), str(value), "mb")
        drawing.write((center, floor + 3), label, "ma")


def _draw_rows(drawing: "Drawing", chart: Chart, top: int) -> None:
    left = 10 + max(drawing.measure(label) for label in chart.labels)
    right = chart.width - 10 - 2 * chart.text
    step, largest = (chart.height - top - 6) / len(chart.labels), max(chart.values)
    drawing.pen.line([(left, top), (left, chart.height - 6)], INK, 2)
    for at, (label, value, color) in enumerate(_list_marks(chart)):
        center, length = top + step * (at + 0.5), (right - left) * value / largest
        x = left + max(1, length)  # at least the axis
        box = (left + 1, center - 0.3 * step, x, center + 0.3 * step)
        drawing.mark(box, color, "rectangle")
        drawing.write((x + 4, center), str(value), "lm")
        drawing.write((left - 5, center), label, "rm")


def _draw_line(drawing: "Drawing", chart: Chart, top: int) -> None:
    floor, ceiling = chart.height - 1.6 * chart.text, top + 1.6 * chart.text
    _draw_grid(drawing, chart, ceiling, floor)
    step, largest = (chart.width - 20) / len(chart.labels), max(chart.values)
    points = [
        (10 + step * (at + 0.5), floor - 6 - (floor - 6 - ceiling) * value / largest)
        for at, value in enumerate(chart.values)
    ]
    drawing.pen.line([(6, floor), (chart.width - 6, floor)], INK, 2)
    drawing.pen.line(points, LINES if len(set(chart.colors)) > 1 else PALETTE[chart.colors[0]], 3)
    for (x, y), (label, value, color) in zip(points, _list_marks(chart), strict=True):
        drawing.mark((x - 5, y - 5, x + 5, y + 5), color, "ellipse")
        # A white background, so that no line crosses the digits.
        box = drawing.pen.textbbox((x, y - 7), str(value), drawing.font, anchor="mb")
        drawing.pen.rectangle(box, "white")
        drawing.write((x, y - 7), str(value), "mb")
        drawing.write((x, floor + 3), label, "ma")


def _draw_pie(drawing: "Drawing", chart: Chart, top: int) -> None:
    """Draw a disk, and a legend with the label and value of each slice."""
    legend = max(drawing.measure(f"{label} 00") for label in chart.labels) + 2 * chart.text
    side = min(chart.width - legend - 16, chart.height - top - 8)
    start, total = -90.0, sum(chart.values)
    step = (chart.height - top - 8) / len(chart.labels)
    for at, (label, value, color) in enumerate(_list_marks(chart)):
        end = start + 360 * value / total
        drawing.pen.pieslice([6, top, 6 + side, top + side], start, end, PALETTE[color], "white")
        start, y = end, top + step * (at + 0.5)
        x = chart.width - legend
        half = 0.4 * chart.text
        drawing.mark((x, y - half, x + 2 * half, y + half), color, "rectangle")
        drawing.write((x + 1.2 * chart.text, y), f"{label} {value}", "lm")


def _draw_grid(drawing: "Drawing", chart: Chart, ceiling: float, floor: float) -> None:
    for at in range(4 * chart.has_grid):
        y = ceiling + (floor - ceiling) * at / 4
        drawing.pen.line([(6, y), (chart.width - 6, y)], LINES, 1)


def _list_marks(chart: Chart) -> Sequence[tuple[str, int, str]]:
    return list(zip(chart.labels, chart.values, chart.colors, strict=True))


_DRAW: dict[str, Callable[..., None]] = {
    "bar": _draw_bars,
    "row": _draw_rows,
    "line": _draw_line,
    "pie": _draw_pie,
}
