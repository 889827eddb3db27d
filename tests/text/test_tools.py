"""Laws of the tool call parser: calls, text, and independence of the pieces of a stream."""

import ast
import json
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from l4jax.text.tools import (
    MAX_DEPTH,
    CallDelta,
    Parsed,
    TextDelta,
    ToolCall,
    ToolCallParser,
    parse_tool_calls,
)

NAMES = ("get_weather", "maps.geo.search", "f", "fetch-page")


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def stream(pieces: list[str], names: Any = NAMES) -> Parsed:
    """Parse pieces, and join the events as `parse_tool_calls` does."""
    reader = ToolCallParser(names)
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    calls = [event for event in events if isinstance(event, CallDelta)]
    assert [event.index for event in calls] == list(range(len(calls)))
    content = "".join(event.text for event in events if isinstance(event, TextDelta))
    return Parsed(content, tuple(event.call for event in calls))


# Calls.

PARIS = call("get_weather", city="Paris", unit="c")
CALLS = {
    """[get_weather(city="Paris", unit='c')]""": (PARIS,),
    '[ get_weather( city = "Paris" ,\n unit = "c", ) , ]': (PARIS,),
    '<|python_start|>[get_weather(city="Paris", unit="c")]<|python_end|>': (PARIS,),
    "<|python_start|>\n[f()]\n<|python_end|>\n": (call("f"),),
    '[f(), get_weather(city="Paris", unit="c"), f()]': (call("f"), PARIS, call("f")),
    "[f()]\n[f(x=1)]": (call("f"), call("f", x=1)),
    '[maps.geo.search(q=[1, 2.5, None], opts={"x": True})]': (
        call("maps.geo.search", q=[1, 2.5, None], opts={"x": True}),
    ),
    "[fetch-page(url='https://a.b/c?d=[1]')]": (call("fetch-page", url="https://a.b/c?d=[1]"),),
    '{"name": "get_weather", "parameters": {"city": "Paris", "unit": "c"}}': (PARIS,),
    '{"arguments": {"city": "Paris", "unit": "c"}, "name": "get_weather"}': (PARIS,),
    '{"type": "function", "name": "f", "parameters": {}}': (call("f"),),
    '[{"name": "f", "parameters": {}}, {"name": "f", "arguments": {"x": null}}]': (
        call("f"),
        call("f", x=None),
    ),
    '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"x": 1}};': (
        call("f"),
        call("f", x=1),
    ),
    '{"name": "f", "parameters": {}}\n\n{"name": "f", "parameters": {"x": 1}}\n': (
        call("f"),
        call("f", x=1),
    ),
    '{"name": "f", "parameters": {}}{"name": "f", "parameters": {}}': (call("f"), call("f")),
    # The published template's form, with its special tokens kept.
    '<|python_start|><|python_end|>{"name": "f", "parameters": {}}': (call("f"),),
}


@pytest.mark.parametrize("text", CALLS)
def test_an_answer_of_calls_leaves_no_text(text: str) -> None:
    assert parse_tool_calls(text, NAMES) == Parsed("", CALLS[text])


@pytest.mark.parametrize("text", CALLS)
def test_text_around_calls_is_kept(text: str) -> None:
    parsed = parse_tool_calls(f"Let me see.\n\n{text} That was [1] of them.", NAMES)
    assert parsed.calls == CALLS[text]
    assert parsed.content.startswith("Let me see.\n\n")
    assert parsed.content.split() == ["Let", "me", "see.", "That", "was", "[1]", "of", "them."]


VALUES = {
    "'it\\'s \\\"so\\\"'": 'it\'s "so"',
    '"it\'s \\"so\\""': 'it\'s "so"',
    '"\\n\\t\\\\ \\x41\\u00e9\\U0001F600 \\101 \\0"': "\n\t\\ Aé😀 A \0",
    '"\\ud83d\\ude00"': "😀",
    '"half \\ud83d"': "half \ufffd",
    '"a\\/b \\d+"': "a/b \\d+",
    '"two\nlines"': "two\nlines",
    "-12": -12,
    "+7": 7,
    "1_000": 1000,
    "-0.5e-3": -0.0005,
    ".5": 0.5,
    "3.": 3.0,
    "1e999": 1.7976931348623157e308,
    "123456789012345678901234567890": 123456789012345678901234567890,
    "True": True,
    "false": False,
    "None": None,
    "null": None,
    "()": [],
    "(1)": 1,
    "(1,)": [1],
    "(1, [2, (3, 4)])": [1, [2, [3, 4]]],
    "{'a': {\"b\": []}, 1: 2, None: 3, True: 4,}": {"a": {"b": []}, "1": 2, "null": 3, "true": 4},
}


@pytest.mark.parametrize("text", VALUES)
def test_arguments_keep_their_types(text: str) -> None:
    for whole in (f"[f(x={text})]", f'{{"name": "f", "parameters": {{"x": {text}}}}}'):
        parsed = parse_tool_calls(whole, NAMES)
        assert parsed == Parsed("", (call("f", x=VALUES[text]),))


# Text.

TEXTS = [
    "",
    "[1] see note",
    "[citation needed], and [f] too",
    "a[f] = b[g(x)]",
    "The list [1, 2, 'three'] and the set {1, 2}.",
    "[f(x) for x in range(3)]",
    "[f(x=1) for x in range(3)]",
    "[f(x=1) + f(x=2)]",
    "[f(x=y)]",
    "[f(x=1, x=2)]",
    "[f(1)]",
    "[f(x=1]",
    "[f(x=0123)]",
    "[f(x=1-2)]",
    "[f(x=Truer)]",
    "[f(x={[1]: 2})]",
    "[f(x={1, 2})]",
    "[f(x='\\x4')]",
    "[f(x='\\U99999999')]",
    "[f (x=1)]",
    "[]",
    "{}",
    "f(x=1)",
    "[g(x=1)]",  # not declared
    "[maps.geo(x=1)]",
    '{"name": "g", "parameters": {}}',
    '{"name": "f"}',
    '{"parameters": {}}',
    '{"name": "f", "parameters": []}',
    '{"name": "f", "parameters": {}, "arguments": {}}',
    '{"name": "f", "parameters": {}, "id": 1}',
    '{"name": "f", "name": "f", "parameters": {}}',
    '{"name": "f", "type": "person", "parameters": {}}',
    '{"a": [{"name": "f", "parameters": {}}], "b": 2}',
    '[{"id": 1}, {"name": "f", "parameters": {}}]',
    '{"name": 1, "parameters": {}}',
    "```\n[f(x=1)]\n```\n",
    '```json\n{"name": "f", "parameters": {}}\n```',
    "  ````python\n```\n[f(x=1)]",
    "Write `[f(x=1)]` to call it.",
    'One line: ```{"name": "f", "parameters": {}}```',
    "<|python_start|>print(1)<|python_end|>",
    "<|python_",
    "a < b > c <| d",
    "[f(x=" + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + ")]",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_resembles_a_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text, NAMES) == Parsed(text, ())


@pytest.mark.parametrize(
    "text",
    [
        "[1] [f()]",
        "[[f()]",
        "[citation needed] [f()]",
        '{"a": 1} [f()]',
        "```\n[f(x=1)]\n```\n[f()]",
        "Not `[f(x=1)]` but [f()]",
        "'''[f(x=1) '[f()]",
        "[f(x=0123)] [f()]",
    ],
)
def test_a_call_after_text_that_resembles_one_is_parsed(text: str) -> None:
    assert parse_tool_calls(text, NAMES) == Parsed(text.removesuffix("[f()]"), (call("f"),))


def test_without_names_any_name_is_a_call() -> None:
    text = '[a.b(x=1)] {"name": "c", "arguments": {}}'
    assert parse_tool_calls(text, ["c"]) == Parsed("[a.b(x=1)] ", (call("c"),))
    assert parse_tool_calls(text) == Parsed("", (call("a.b", x=1), call("c")))
    assert parse_tool_calls('{"name": "Ada Byron", "arguments": {}}').calls == ()
    assert parse_tool_calls(text, []) == Parsed(text, ())


def test_values_nest_up_to_max_depth() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    parsed = parse_tool_calls(f"[f(x={text})]", NAMES)
    assert parsed == Parsed("", (ToolCall("f", f'{{"x": {text}}}'),))


# Calls truncated by the end of the answer.


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(x=1), get_weather(city='Par", (call("f", x=1),)),
        ("[get_weather(city='Paris', unit='c'), f(x=1)]", (PARIS, call("f", x=1))),
        ('[{"name": "f", "parameters": {}}, {"name": "f", "param', (call("f"),)),
        ('{"name": "f", "parameters": {}}; {"name": "f", "param', (call("f"),)),
        ('<|python_start|>[f(), f(x={"a": [1, ', (call("f"),)),
    ],
)
def test_a_truncated_call_is_text_and_the_calls_before_it_are_calls(
    text: str, calls: tuple[ToolCall, ...]
) -> None:
    for end in range(len(text) + 1):
        parsed = parse_tool_calls(text[:end], NAMES)
        assert parsed.calls == calls[: len(parsed.calls)]
        # Nothing is lost: the content is the end of the text, up to blanks.
        assert text[:end].endswith(parsed.content)
        if not parsed.calls:
            assert parsed.content == text[:end]
    assert parse_tool_calls(text, NAMES).calls == calls


def test_a_truncated_call_is_returned_as_text_from_its_name_on() -> None:
    parsed = parse_tool_calls("See: [f(x=1), get_weather(city='Par", NAMES)
    assert parsed == Parsed("See: get_weather(city='Par", (call("f", x=1),))
    assert parse_tool_calls("[f(x=1)", NAMES) == Parsed("", (call("f", x=1),))
    assert parse_tool_calls("[f(x=1) ", NAMES) == Parsed("", (call("f", x=1),))


# The references: Python's repr and literal_eval, and JSON.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
PYTHON_VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True)
CALL_NAMES = st.sampled_from(NAMES)


@settings(max_examples=300, deadline=None)
@given(
    calls=st.lists(
        st.tuples(CALL_NAMES, st.dictionaries(KEYS, PYTHON_VALUES, max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_pythonic_arguments_equal_what_python_parses(calls: list[tuple[str, dict]]) -> None:
    rendered = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    parsed = parse_tool_calls(f"[{', '.join(rendered)}]", NAMES)
    assert parsed.content == ""
    assert [found.name for found in parsed.calls] == [name for name, _ in calls]
    for found, (_, arguments) in zip(parsed.calls, calls, strict=True):
        read = {key: ast.literal_eval(repr(value)) for key, value in arguments.items()}
        assert json.loads(found.arguments) == json.loads(json.dumps(read))


@settings(max_examples=300, deadline=None)
@given(
    calls=st.lists(
        st.tuples(CALL_NAMES, st.dictionaries(TEXT, JSON_VALUES, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    key=st.sampled_from(["parameters", "arguments"]),
    separator=st.sampled_from([None, "; ", "\n", ""]),
    is_ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
def test_json_arguments_equal_what_json_parses(
    calls: list[tuple[str, dict]],
    key: str,
    separator: str | None,
    is_ascii: bool,
    indent: int | None,
) -> None:
    objects = [{"name": name, key: arguments} for name, arguments in calls]
    rendered = [
        json.dumps(value, ensure_ascii=is_ascii, indent=indent)
        for value in (objects if separator is not None else [objects])
    ]
    parsed = parse_tool_calls((separator or "").join(rendered), NAMES)
    assert parsed.content == ""
    assert [found.name for found in parsed.calls] == [name for name, _ in calls]
    for found, value in zip(parsed.calls, objects, strict=True):
        assert json.loads(found.arguments) == value[key]


# Streaming.

FRAGMENTS = [
    *["[", "]", "{", "}", "(", ")", ",", ";", ":", "=", '"', "'", "\\", "`", "```\n", "\n", " "],
    *["f", "get_weather", "g", "x", "name", '"name": "f"', '"parameters": {}', "1", "-2.5e3"],
    *["True", "null", "\\u0041", "[f(x=1)", "f()", '{"name": "f", "parameters": {"x": [1]}}'],
    *["<|python_start|>", "<|python_end|>", "<", "|", "é", "some text"],
]
ANSWERS = st.lists(
    st.sampled_from(FRAGMENTS) | st.sampled_from([*CALLS, *TEXTS]) | st.text(max_size=3),
    max_size=12,
).map("".join)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(text=ANSWERS, data=st.data(), names=st.sampled_from([NAMES, None]))
def test_events_do_not_depend_on_the_pieces(text: str, data: st.DataObject, names: Any) -> None:
    whole = parse_tool_calls(text, names)
    assert stream(list(text), names) == whole
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    assert stream(pieces, names) == whole


@pytest.mark.parametrize("value", VALUES)
def test_events_do_not_depend_on_any_two_cuts(value: str) -> None:
    text = f"[f(x={value}, y=1)]"
    whole = parse_tool_calls(text, NAMES)
    for start, end in combinations(range(len(text)), 2):
        assert stream([text[:start], text[start:end], text[end:]]) == whole


@settings(max_examples=500, deadline=None)
@given(text=ANSWERS)
@example("[f(x=1), g(")
def test_text_without_calls_is_unchanged(text: str) -> None:
    parsed = parse_tool_calls(text, NAMES)
    if not parsed.calls:
        assert parsed.content == text
    for found in parsed.calls:
        assert found.name in NAMES
        assert isinstance(json.loads(found.arguments), dict)


@pytest.mark.parametrize(
    ("text", "waits"),
    [
        ("Plain text, at once.", ""),
        ("See [1", ""),
        ("See [", "["),
        ("See [g", "[g"),  # may still become get_weather
        ("See [go", ""),
        ("See [get_weather(city", "[get_weather(city"),
        ("See [get_weather(city=Paris", ""),
        ("a <", "<"),
        ("a <|python_", "<|python_"),
        ("a <b", ""),
        ('{"na', '{"na'),
        ('{"nation', ""),
        ('{"name": "g', '{"name": "g'),
        ('{"name": "go on', ""),
        ('{"data": [{"name": "f", ', ""),
        ("```\n[f(x=", ""),
        ("`[f(x=", ""),
    ],
)
def test_text_is_buffered_only_while_it_may_become_a_call(text: str, waits: str) -> None:
    reader = ToolCallParser(NAMES)
    shown = ""
    for char in text:
        for event in reader.push(char):
            assert isinstance(event, TextDelta)
            shown += event.text
    assert shown == text.removesuffix(waits)


def test_a_call_is_emitted_with_its_last_character() -> None:
    text = 'Hi {"name": "f", "parameters": {"x": 1}} [f(), f(x=2)]'
    reader = ToolCallParser(NAMES)
    came = {
        end: event.index
        for end, char in enumerate(text, start=1)
        for event in reader.push(char)
        if isinstance(event, CallDelta)
    }
    ends = [text.index("}}") + 2, text.index("(),") + 3, len(text)]
    assert came == {end: index for index, end in enumerate(ends)}
    assert reader.finish() == []


# Cost.

HARD = [
    *[
        "[",
        "{",
        "(",
        "[a(",
        "[a(x=",
        "[a(x=[",
        '[a(x="',
        '[a(x="\\',
        "[a(x=-",
        "[a(x=1),",
        "[a()]\n",
    ],
    *['{"a":', '{"name":', '{"name":"a","parameters":{"x":[', '{"name": "', "`[", "\n```", "<|"],
    *["<|python_start|>", " ", "a", "9", "\\", "'", "[a(x=1) ", "[a,", "[{"],
]


@pytest.mark.usefixtures("hang_guard")
@pytest.mark.parametrize("piece", [3, 1 << 30])
@pytest.mark.parametrize("part", HARD)
def test_hard_text_is_parsed_in_linear_time(part: str, piece: int) -> None:
    """Thirty thousand characters take a second; in quadratic time they would take an hour."""
    text = (part * 30_000)[:30_000]
    reader = ToolCallParser()
    for at in range(0, len(text), piece):
        reader.push(text[at : at + piece])
    reader.finish()
