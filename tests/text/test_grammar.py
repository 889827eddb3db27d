"""Laws of structured outputs: token bitmasks allow every matching answer, and no other."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.text.grammar import Grammar, GrammarError, Matcher, tool_schema
from l4jax.text.tokenizer import Tokenizer
from l4jax.text.tools import parse_tool_calls

VOCAB = 530  # more than the tokenizer has, and not a multiple of 32
CLOSERS = tuple(b'"}])')


def find_stops(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.token_id(name) for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>")]


def unpack(mask_V: np.ndarray) -> list[int]:
    bits_V = np.unpackbits(mask_V.astype("<i4").view(np.uint8), bitorder="little")
    return np.flatnonzero(bits_V).tolist()


def walk(
    tokenizer: Tokenizer, matcher: Matcher, seed: int, *, judge: bool = False, most: int = 2000
) -> str:
    """Sample a random answer of allowed tokens, with a preference for closing tokens.

    With `judge`, every forbidden token is tried first.
    """
    draw = random.Random(seed)
    stops = find_stops(tokenizer)
    ids: list[int] = []
    for _ in range(most):
        allowed = unpack(matcher.mask())
        assert set(stops) <= set(allowed) or not set(stops) & set(allowed)
        if judge:
            forbidden = set(range(-1, VOCAB + 40)) - set(allowed)
            assert not any(matcher.accept(token) for token in forbidden)
            assert unpack(matcher.mask()) == allowed
        plain = [token for token in allowed if token not in stops]
        assert not any(tokenizer.is_special(token) for token in plain)
        assert all(tokenizer.token_bytes(token) for token in plain)
        assert matcher.is_done == (not plain)
        if not plain or (stops[0] in allowed and draw.random() < 0.5):
            assert matcher.accept(stops[0])
            assert matcher.is_done
            assert unpack(matcher.mask()) == stops
            assert not any(matcher.accept(token) for token in (*stops, *range(256)))
            return b"".join(map(tokenizer.token_bytes, ids)).decode()
        closing = [token for token in plain if token in CLOSERS]
        chosen = draw.choice(closing if closing and draw.random() < 0.4 else plain)
        assert matcher.accept(chosen)
        ids.append(chosen)
    raise AssertionError(f"no end after {most} tokens: {tokenizer.decode(ids[:200])}")


SCHEMAS: dict[str, Any] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "height": {"type": "number"},
            "tags": {
                "type": "array",
                "items": {"enum": ["a", "b c", 'd"', 1, None]},
                "maxItems": 3,
            },
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "union": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"const": {"x": [1, "é"]}}]},
    "array": {"type": "array", "minItems": 2, "maxItems": 4, "items": {"type": "integer"}},
    "reference": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "multipleOf": 3},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("seed", range(8))
def test_every_answer_that_a_schema_allows_is_valid(tiny: Tokenizer, name: str, seed: int) -> None:
    schema = SCHEMAS[name]
    value = schema if seed % 2 else json.dumps(schema)
    matcher = Grammar.compile(tiny, "json", value).start(VOCAB, find_stops(tiny))
    text = walk(tiny, matcher, seed, judge=seed < 2)
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("seed", range(6))
def test_json_object_allows_any_object(tiny: Tokenizer, seed: int) -> None:
    matcher = Grammar.compile(tiny, "json_object").start(VOCAB, find_stops(tiny))
    assert isinstance(json.loads(walk(tiny, matcher, seed)), dict)
    matcher = Grammar.compile(tiny, "json_object").start(VOCAB, find_stops(tiny))
    for byte in b'{"a": [1, {"b": null}, "\\n"], "c": -1.5e3}':
        assert matcher.accept(byte)
    assert matcher.is_done


@pytest.mark.parametrize(
    "regex",
    [
        r"(the|water)+ [0-9]{2,4}",
        r"\d{4}-\d\d-\d\d",
        r"[^\x00-\x7f]{1,3}",
        "the water is blue because the light",
        r"a?b*",
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_every_answer_that_a_regex_allows_matches_it(
    tiny: Tokenizer, regex: str, seed: int
) -> None:
    matcher = Grammar.compile(tiny, "regex", regex).start(VOCAB, find_stops(tiny))
    assert re.fullmatch(regex, walk(tiny, matcher, seed, judge=True))


def test_exactly_the_choices_are_allowed(tiny: Tokenizer) -> None:
    choices = ["a", "ab", "b\nc", 'q"\\é', "/x/i", "the sky", "<|eot|>"]
    grammar = Grammar.compile(tiny, "choice", choices)
    texts = {
        walk(tiny, grammar.start(VOCAB, find_stops(tiny)), seed, judge=seed < 5)
        for seed in range(80)
    }
    assert texts == set(choices)


def test_a_lark_grammar_is_enforced(tiny: Tokenizer) -> None:
    lark = 'start: "the " ("sky" | "water") (" is " WORD)*\nWORD: /[a-z]{1,5}/'
    grammar = Grammar.compile(tiny, "grammar", lark)
    for seed in range(10):
        text = walk(tiny, grammar.start(VOCAB, find_stops(tiny)), seed, judge=seed < 2)
        assert re.fullmatch(r"the (sky|water)( is [a-z]{1,5})*", text)


def test_matchers_of_one_grammar_are_independent(tiny: Tokenizer) -> None:
    grammar = Grammar.compile(tiny, "choice", ["ab", "cd"])
    first, second = (grammar.start(VOCAB, find_stops(tiny)) for _ in range(2))
    assert first.accept(ord("a"))
    assert unpack(second.mask()) == [ord("a"), ord("c")]
    assert unpack(first.mask()) == [ord("b")]


def test_bitmasks_have_the_size_of_the_model_vocabulary(tiny: Tokenizer) -> None:
    grammar = Grammar.compile(tiny, "regex", "(?s:.*)")
    for vocab in (tiny.vocab_size, 512, 513, 4096):
        mask_V = grammar.start(vocab, find_stops(tiny)).mask()
        assert mask_V.dtype == np.int32
        assert mask_V.shape == (-(-vocab // 32),)
        assert max(unpack(mask_V)) < tiny.vocab_size


def test_stop_tokens_need_not_be_special(tiny: Tokenizer) -> None:
    matcher = Grammar.compile(tiny, "regex", "ab").start(VOCAB, [ord("!"), VOCAB - 1])
    assert not matcher.accept(ord("!"))
    assert matcher.accept(ord("a"))
    assert matcher.accept(ord("b"))
    assert unpack(matcher.mask()) == [ord("!"), VOCAB - 1]
    assert matcher.accept(VOCAB - 1)


# Refusals.


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("json", {"type": "strin"}, "strin"),
        ("json", "{", "Expecting property name"),
        ("json", [1], "an object, not a list"),
        ("json", True, "an object, not a bool"),
        ("json", {1, 2}, "not JSON serializable"),
        ("json", "[" * 50_000, "nested too deeply"),
        ("json", '{"items":' * 500 + "{}" + "}" * 500, "recursion limit"),
        ("json", {"$ref": "#"}, "no text matches"),
        ("json", {"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ("json", {"$ref": "https://example.com/schema.json"}, "example.com"),
        ("json", {"multipleOf": float("nan")}, "JSON compliant"),
        ("json", {"const": "\ud800"}, "hex escape"),
        ("regex", "(a", "unclosed group"),
        ("regex", "", "not empty"),
        ("regex", None, "must be a text"),
        ("regex", r"[^\s\S]", "no text matches"),
        ("regex", "\ud800", "surrogates"),
        ("choice", [], "at least one"),
        ("choice", "abc", "must be a list"),
        ("choice", ["a", 1], "must be a list"),
        ("grammar", "start: nothing", "nothing"),
        ("grammar", "start: <|eot|>", "unknown special token"),
        ("grammar", "start: <[464]>", "no text matches"),
        ("grammar", 'start: "a"\n%llguidance {"no_forcing": false}', "%llguidance is not allowed"),
        ("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "too deeply nested"),
    ],
)
def test_an_invalid_value_is_refused_by_field(
    tiny: Tokenizer, kind: str, value: Any, words: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(words)) as error:
        Grammar.compile(tiny, kind, value, where="response_format.x")
    text = str(error.value)
    assert text.startswith("response_format.x: ")
    assert "\n" not in text
    assert len(text) < 400


def test_an_unknown_kind_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(GrammarError, match=r"'xml' is not one of json, json_object, regex"):
        Grammar.compile(tiny, "xml", "")


BOMBS = {
    "long schema": ("json", {"enum": ["x" * 300_000]}),
    "many fields": (
        "json",
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}},
    ),
    "remainders": ("json", {"type": "integer", "multipleOf": 9_999_991}),
    "remainders that multiply": (
        "json",
        {"anyOf": [{"type": "integer", "multipleOf": 900 + n} for n in range(60)]},
    ),
    "fine remainders": ("json", {"type": "number", "multipleOf": 0.000_999_999_1}),
    "long pattern": ("json", {"type": "string", "pattern": "a?" * 20_000}),
    "long pattern of fields": (
        "json",
        {"type": "object", "patternProperties": {"a?" * 20_000: {"type": "string"}}},
    ),
    "long regex": ("regex", "a?" * 20_000),
    "long grammar": ("grammar", "start: " + '"a"? ' * 20_000),
    "schema in a grammar": ("grammar", 'start: %json {"type": "integer", "multipleOf": 9999991}'),
    "many choices": ("choice", ["x" * 100] * 5000),
}


@pytest.mark.usefixtures("hang_guard")
@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_above_the_limits_is_refused(tiny: Tokenizer, name: str) -> None:
    kind, value = BOMBS[name]
    with pytest.raises(GrammarError):
        Grammar.compile(tiny, kind, value)


@pytest.mark.usefixtures("hang_guard")
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "((a{1,1000}){1,1000}){1,1000}"),
        ("regex", "(a|b)*a(a|b){5000}"),
        ("regex", r"(\w|\d|\s){0,100000}"),
        ("regex", "(a*)*(a*)*(a*)*b"),
        ("regex", "a?" * 5000),
        ("regex", "a*b*" * 2500),
        ("grammar", 'start: a a a a\na: a a | "x" | ""'),
        ("grammar", 'start: (("a" "b"){1,1000}){1,1000}'),
        ("grammar", "start: /b+/ /b+/"),
        ("grammar", "start: /b+/ start"),
        ("grammar", 'start: "the"{1000000000}'),
        ("regex", "a{1000000000}"),
        ("json", {"type": "string", "minLength": 10**6, "maxLength": 10**8}),
        ("json", {"type": "string", "pattern": "^((a{1,1000}){1,1000})$"}),
        ("json", {"type": "integer", "multipleOf": 99_991}),
        ("json", {"type": "array", "minItems": 10**7, "items": {"type": "string"}}),
        ("json", {"allOf": [{"properties": {f"a{n}": {"type": "string"}}} for n in range(300)]}),
    ],
)
def test_no_grammar_makes_a_token_hang(tiny: Tokenizer, kind: str, value: Any) -> None:
    """A grammar may be enforced or refused with an error; it may not hang."""
    draw = random.Random(0)
    try:
        matcher = Grammar.compile(tiny, kind, value).start(VOCAB, [])
        for _ in range(100):
            matcher.accept(draw.choice(unpack(matcher.mask()) or [-1]))
    except GrammarError as error:
        assert "\n" not in str(error)


LARK_PIECES = [
    *["start", ":", "|", '"a"', "/b+/", "(", ")", "?", "*", "{2,3}", "\n", "T", "<[1]>", "%json"],
    *["%ignore", "&", "~", "{", "}", "->", "[", "]", "/(/", "\\", "%regex", "<|eot|>", "'"],
]
LARK_TEXTS = st.lists(st.sampled_from(LARK_PIECES), max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=8) | LARK_TEXTS.map("start: {}".format))
def test_any_text_compiles_or_is_refused(tiny: Tokenizer, text: str) -> None:
    for kind in ("grammar", "regex", "json"):
        try:
            grammar = Grammar.compile(tiny, kind, text)
        except GrammarError:
            continue
        assert unpack(grammar.start(VOCAB, find_stops(tiny)).mask())


def test_without_llguidance_the_error_names_the_package_to_install() -> None:
    program = """
import sys
sys.modules["llguidance"] = None
from l4jax.text.grammar import Grammar
try:
    Grammar.compile(None, "json_object")
except ImportError as error:
    print(error)
assert not {"torch", "jax"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 'pip install "l4jax[serve]"' in result.stdout, result.stderr


# Tools.


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


PLACE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$defs": {"unit": {"enum": ["c", "f"]}},
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"$ref": "#/$defs/unit"},
        "range": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    tool("get_weather", PLACE),
    tool("maps.now"),
    tool(
        "note", {"properties": {"x": {"type": ["integer", "null"]}}, "additionalProperties": False}
    ),
]


def read_calls(text: str, tools: Sequence[dict]) -> list[tuple[str, Any]]:
    parameters = {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}
    parsed = parse_tool_calls(text, parameters)
    assert parsed.content == ""
    for call in parsed.calls:
        jsonschema.validate(json.loads(call.arguments), parameters[call.name])
    return [(call.name, json.loads(call.arguments)) for call in parsed.calls]


@pytest.mark.parametrize("is_parallel", [True, False])
def test_required_calls_are_parsed_back(tiny: Tokenizer, is_parallel: bool) -> None:
    schema = tool_schema(TOOLS, is_parallel=is_parallel)
    grammar = Grammar.compile(tiny, "json", schema)
    seen = []
    for seed in range(20):
        text = walk(tiny, grammar.start(VOCAB, find_stops(tiny)), seed)
        calls = read_calls(text, TOOLS)
        assert calls == [(value["name"], value["parameters"]) for value in json.loads(text)]
        assert calls
        seen.append(calls)
    assert {name for calls in seen for name, _ in calls} == {"get_weather", "maps.now", "note"}
    assert (max(map(len, seen)) > 1) == is_parallel


@pytest.mark.parametrize("name", ["get_weather", "maps.now", "note"])
def test_a_named_call_is_parsed_back(tiny: Tokenizer, name: str) -> None:
    grammar = Grammar.compile(tiny, "json", tool_schema(TOOLS, name))
    for seed in range(8):
        text = walk(tiny, grammar.start(VOCAB, find_stops(tiny)), seed)
        calls = read_calls(text, TOOLS)
        assert [found for found, _ in calls] == [name]


def test_tools_that_cannot_be_called_are_refused() -> None:
    with pytest.raises(GrammarError, match=r"tool_choice: no tool is named 'x'; take one of get"):
        tool_schema(TOOLS, "x")
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(GrammarError, match="tools: parameters are nested too deeply"):
        tool_schema([tool("f", deep)])


# Llama 4's own tokenizer.


@pytest.fixture(scope="module")
def real_grammar(real: Tokenizer) -> Grammar:
    return Grammar.compile(real, "json", SCHEMAS["person"])


def test_answers_of_the_real_vocabulary_are_valid(real: Tokenizer, real_grammar: Grammar) -> None:
    stops = find_stops(real)
    for text in (
        '{"name": "Ada Byron", "age": 36}',
        '{\n  "name": "日本語 👩‍👩‍👧‍👦",\n  "age": 0\n}',
    ):
        matcher = real_grammar.start(202_048, stops)
        for token in real.encode(text, add_special_tokens=False):
            assert not matcher.accept(stops[0])
            assert matcher.accept(token), real.token_bytes(token)
        assert matcher.is_done
        assert unpack(matcher.mask()) == sorted(stops)
