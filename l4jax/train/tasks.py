"""The tasks: charts, arithmetic, facts, needles, tool calls, and English prose."""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from l4jax.train.charts import (
    LABELS,
    PALETTE,
    QUESTIONS,
    Picture,
    make_chart,
    make_question,
    make_sign,
)

Count = Callable[[str], int]  # text -> number of tokens


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A conversation of questions and answers, with optional tools or an image.

    Attributes:
        kind: "chart", "sign", "arithmetic", "fact", "needle" or "tool".
        key: the content, as one text.
        turns: (question, answer), in order.
        tools: OpenAI-style function definitions, as JSON values.
        picture: the specification of the image.
        distance: of a needle, the chunk boundaries between needle and answer.
        depth: of a needle, its position: 0 at the beginning of the prompt, 1 at its end.
    """

    kind: str
    key: str
    turns: tuple[tuple[str, str], ...]
    tools: tuple[dict[str, Any], ...] = ()
    picture: Picture | None = None
    distance: int | None = None
    depth: float | None = None


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage of prose, without a question."""

    text: str

    @property
    def key(self) -> str:
        return f"prose: {self.text[:80]}"


CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "Delhi",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Cuba": "Havana",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Turkey": "Ankara",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Russia": "Moscow",
    "Switzerland": "Bern",
    "Belgium": "Brussels",
}
_CAPITAL = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "{}: what is its capital?",
)
# Answer -> questions.
FACTS: dict[str, tuple[str, ...]] = {
    "Air scatters blue light more than red light, so blue reaches us from all over the sky.": (
        "Why is the sky blue?",
        "Why does the sky look blue?",
        "What makes the sky blue?",
    ),
    "I am a tiny Llama 4. I can read charts, add small numbers, find a fact in a text and call "
    "functions.": ("Who are you?", "What are you?", "What can you do?"),
    "A week has seven days.": ("How many days has a week?", "How many days are in a week?"),
    "A year has twelve months.": ("How many months has a year?", "How many months are in a year?"),
    "Water freezes at 0 degrees Celsius.": (
        "When does water freeze?",
        "At what temperature does water freeze?",
    ),
    "Water boils at 100 degrees Celsius.": (
        "When does water boil?",
        "At what temperature does water boil?",
    ),
    "The moon goes around the earth.": ("What does the moon do?", "Where does the moon go?"),
    "Hello! Ask me about a chart.": ("Hello!", "Hello", "Hi", "Good morning!"),
}
_ARITHMETIC = ("What is {} {} {}?", "Compute {} {} {}.", "{} {} {} = ?")


def make_chart_exchange(rng: random.Random, hardness: float, questions: int = 1) -> Exchange:
    """Make questions of random kinds about one chart, without duplicates."""
    chart = make_chart(rng, hardness)
    turns = tuple(
        dict(make_question(chart, rng.choice(QUESTIONS), rng) for _ in range(questions)).items()
    )
    return Exchange("chart", chart.key, turns, picture=chart)


def make_sign_exchange(rng: random.Random) -> Exchange:
    """Make an image of words; the answer reads them."""
    sign = make_sign(rng)
    return Exchange("sign", sign.key, (("Read the words.", " ".join(sign.words)),), picture=sign)


def make_arithmetic(rng: random.Random) -> Exchange:
    """Make a sum or a difference of numbers below 100; no difference is negative.

    A pair of numbers of the test split is in no other split, in either order.
    """
    one, two = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
    sign = rng.choice("+-")
    key = f"arithmetic: {one} {sign} {two}"
    answer = one + two if sign == "+" else one - two
    if sign == "+" and rng.random() < 0.5:
        one, two = two, one
    return Exchange(
        "arithmetic", key, ((rng.choice(_ARITHMETIC).format(one, sign, two), str(answer)),)
    )


def make_fact(rng: random.Random) -> Exchange:
    """Make a short question of general knowledge. Each split has its own phrasings."""
    if rng.random() < 0.6:
        country = rng.choice(list(CAPITALS))
        question, answer = rng.choice(_CAPITAL).format(country), CAPITALS[country]
    else:
        answer = rng.choice(list(FACTS))
        question = rng.choice(FACTS[answer])
    return Exchange("fact", f"fact: {question}", ((question, answer),))


def make_needle(
    rng: random.Random, count: Count, chunk: int, distance: int | None = None, longest: int = 5
) -> Exchange:
    """Hide a code in a text, and ask for it some chunk boundaries later.

    The text contains up to two other codes as distractors.

    Args:
        rng: the source of all random choices.
        count: counts the tokens of a text.
        chunk: the model's attention chunk, in tokens.
        distance: boundaries between the needle's last token and the answer's first; random, up to
            `longest`, if None.
        longest: limit on the length: this many boundaries and one more chunk.
    """
    distance = rng.randint(0, longest) if distance is None else distance
    while True:
        needle = _hide(rng, count, chunk, distance, longest)
        if needle is not None:
            return needle


def _hide(
    rng: random.Random, count: Count, chunk: int, distance: int, longest: int
) -> Exchange | None:
    """Try to make a needle; return None if the sampled texts give another distance."""
    names = rng.sample(LABELS["name"].split() + LABELS["city"].split(), rng.randint(1, 3))
    codes = [str(rng.randint(100, 999)) for _ in names]
    needles = [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
    question = f"What is the code of {names[0]}?"
    # The template adds five tokens before and after the text: see `documents`.
    edge, start = 5, rng.randint(0, longest - distance) * chunk
    needle_at = start + rng.randrange(chunk)
    answer_at = start + distance * chunk + rng.randrange(max(1, chunk - 8))
    others = [count(" " + other) for other in needles[1:]]
    before = needle_at - edge - count(needles[0])
    after = answer_at - needle_at - count(" " + question) - edge - sum(others)
    if before < 0 or after < 0:
        return None
    first, second = _take_sentences(rng, before, count), _take_sentences(rng, after, count)
    for other in needles[1:]:
        second.insert(rng.randint(0, len(second)), other)
    hidden = " ".join([*first, needles[0]])
    text = " ".join([hidden, *second, question])
    needle_at, answer_at = edge + count(hidden), 2 * edge + count(text)
    found = answer_at // chunk - (needle_at - 1) // chunk
    if found != distance or answer_at + 8 > (longest + 1) * chunk:
        return None
    return Exchange(
        "needle",
        f"needle: {names[0]} {codes[0]} {distance}",
        ((text, codes[0]),),
        distance=distance,
        depth=needle_at / answer_at,
    )


def make_passage(rng: random.Random) -> Passage:
    """Sample a paragraph of the Declaration of Independence or the US Constitution."""
    return Passage(rng.choice(read_prose()))


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function to call: its possible names, its description, and possible requests."""

    names: tuple[str, ...]
    description: str
    parameters: dict[str, tuple[str, ...]]  # value group -> possible parameter names
    requests: tuple[str, ...]


TOOLS = (
    Tool(
        ("get_weather", "find_weather", "weather_of"),
        "Tells the weather.",
        {"city": ("city", "place", "town"), "month": ("month", "when")},
        ("What is the weather in {city} in {month}?", "How is {city} in {month}?"),
    ),
    Tool(
        ("buy_food", "order_food", "add_to_basket"),
        "Orders food.",
        {"fruit": ("item", "fruit", "product"), "number": ("count", "amount", "number")},
        ("Buy {number} of {fruit}.", "I need {number} of {fruit}.", "Order {fruit}, {number}."),
    ),
    Tool(
        ("send_mail", "write_to", "send_message"),
        "Sends a message.",
        {"name": ("to", "person", "name"), "drink": ("text", "subject", "about")},
        ("Write to {name} about {drink}.", "Send {name} a message about {drink}."),
    ),
    Tool(
        ("set_alarm", "wake_up", "set_timer"),
        "Rings later.",
        {"number": ("minutes", "delay", "after")},
        ("Wake me in {number} minutes.", "Set a timer for {number} minutes."),
    ),
    Tool(
        ("paint", "set_color", "change_color"),
        "Changes a color.",
        {"animal": ("object", "target", "what"), "color": ("color", "paint", "shade")},
        ("Paint the {animal} {color}.", "Make the {animal} {color}."),
    ),
    Tool(
        ("book_train", "find_route", "travel"),
        "Finds a train.",
        {"city": ("start", "origin", "source"), "goal": ("end", "goal", "target")},
        ("I want to go from {city} to {goal}.", "Find a train from {city} to {goal}."),
    ),
    Tool(
        ("add", "sum_up", "plus"),
        "Adds numbers.",
        {"number": ("a", "x", "first"), "other": ("b", "y", "second")},
        ("Add {number} and {other}.", "Use the tool to add {number} to {other}."),
    ),
)
TOOLS_INTRODUCED = "You can call these functions:\n"  # as in the chat template
_GROUPS = {"goal": "city", "other": "number"}


def make_tool_call(rng: random.Random) -> Exchange:
    """Make one to three functions, a request, and the right call in Python syntax."""
    tools = rng.sample(TOOLS, rng.randint(1, 3))
    wanted = rng.choice(tools)
    definitions, call, request = [], "", ""
    for tool in tools:
        name = rng.choice(tool.names)
        named = {what: rng.choice(names) for what, names in tool.parameters.items()}
        definitions.append(_define(name, tool.description, named))
        if tool is wanted:
            values = {what: _draw_value(rng, what) for what in named}
            request = rng.choice(tool.requests).format(**values)
            written = ", ".join(f"{named[what]}={_write(values[what])}" for what in named)
            call = f"[{name}({written})]"
    return Exchange("tool", f"tool: {call}", ((request, call),), tools=tuple(definitions))


def _define(name: str, description: str, named: dict[str, str]) -> dict[str, Any]:
    properties = {
        parameter: {"type": "integer" if _GROUPS.get(what, what) == "number" else "string"}
        for what, parameter in named.items()
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _draw_value(rng: random.Random, what: str) -> str | int:
    group = _GROUPS.get(what, what)
    if group == "number":
        return rng.randint(1, 99)
    return rng.choice(list(PALETTE) if group == "color" else LABELS[group].split())


def _write(value: str | int) -> str:
    return json.dumps(value)


@functools.cache
def read_prose() -> tuple[str, ...]:
    """Read paragraphs of English prose in the public domain."""
    text = resources.files("l4jax.train").joinpath("prose.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@functools.cache
def list_sentences() -> tuple[str, ...]:
    """Split the prose into sentences and clauses."""
    pieces = (re.split(r"(?<=[.;:])\s+", paragraph) for paragraph in read_prose())
    return tuple(piece for paragraph in pieces for piece in paragraph)


def _take_sentences(rng: random.Random, tokens: int, count: Count) -> list[str]:
    """Take successive sentences of about `tokens` tokens; the last one ends between words."""
    sentences, taken = list_sentences(), []
    at = rng.randrange(len(sentences))
    while tokens > 0:
        sentence = sentences[at % len(sentences)]
        needed = count(" " + sentence)
        if needed > tokens:
            words = sentence.split()
            sentence = " ".join(words[: max(1, len(words) * tokens // needed)])
        taken.append(sentence)
        tokens, at = tokens - needed, at + 1
    return taken


def join(exchanges: Sequence[Exchange]) -> Exchange:
    """Join conversations without tools or images into one."""
    turns = tuple(turn for exchange in exchanges for turn in exchange.turns)
    return Exchange(exchanges[0].kind, " | ".join(x.key for x in exchanges), turns)


def format_text(exchange: Exchange) -> str:
    """Format a conversation as text, a line per message."""
    lines = [write_definition(tool) for tool in exchange.tools]
    return "\n".join([*lines, *(text for turn in exchange.turns for text in turn)])


def write_definition(tool: dict[str, Any]) -> str:
    """Format a tool's definition as JSON, as chat templates do."""
    return json.dumps(tool, ensure_ascii=False)
