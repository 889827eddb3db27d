"""Tool calls out of an answer's text, whole or as it arrives.

Llama 4 writes calls in two ways, and both are read:

    [get_weather(city="Paris", days=[1, 2]), maps.search(q='cafe')]
    {"name": "get_weather", "parameters": {"city": "Paris"}}

The second also with "arguments", as a list, or as several behind one another. There is one parser,
`ToolStream`; `parse_tool_calls` is that parser given everything at once. Each character is looked
at once, or twice where something turns out to be no call, so the time is linear in the text.
Nothing is evaluated.
"""

import json
import re
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

PYTHON_MARKS = ("<|python_start|>", "<|python_end|>")
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
# The fields of a JSON call, each with the characters that its value may begin with.
FIELDS = {"name": "\"'", "parameters": "{", "arguments": "{", "type": "\"'"}
CLOSING = {"[": "]", "(": ")"}

# Deeper values are no arguments that anybody wrote on purpose.
MAX_DEPTH = 64
# OpenAI allows 64 characters in a name; dotted ones are longer.
MAX_NAME = 128
# Python refuses to read integers of more than 4300 digits.
MAX_DIGITS = 4000

NAME = re.compile(r"[^\W\d][\w-]*(?:\.[^\W\d][\w-]*)*")
START = re.compile(r"[\[{<]")
RUN = {'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\\]+")}
INTEGER = re.compile(r"[+-]?(?:0+|[1-9](?:_?[0-9])*)")
FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?")
SURROGATE = re.compile("[\ud800-\udfff]")
FENCE = re.compile(r"(```+)[^`]*")

# Python's escapes hold JSON's, but for "\/"; Python would keep that backslash.
ESCAPES = {
    **{char: char for char in "\"'\\/"},
    **{"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""},
}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}

Reader = Generator[None, str, Any]  # waits by `yield`, is sent the next piece of text


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """An answer: its text without the calls, and the calls in order."""

    content: str
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A whole call; `index` counts the calls of the answer from 0."""

    index: int
    call: ToolCall


class NotACallError(Exception):
    """What was read since the last text or call is text."""


def parse_tool_calls(text: str, names: Iterable[str] | None = None) -> Parsed:
    """Take the calls out of an answer.

    Text around the calls stays, but for what holds calls together: brackets, `;`, the marks
    `<|python_start|>` and `<|python_end|>` beside a call, and blanks behind a call that no text
    follows. A call that the answer's end cuts off is text; those before it are calls. Code, in
    backticks or between fences, is text.

    Args:
        text: the answer.
        names: the declared tools; what calls another name is text. None takes any name.
    """
    stream = ToolStream(names)
    events = [*stream.push(text), *stream.finish()]
    return Parsed(
        "".join(event.text for event in events if isinstance(event, TextDelta)),
        tuple(event.call for event in events if isinstance(event, CallDelta)),
    )


class ToolStream:
    """Text in pieces to text and calls, as soon as it is sure which.

    However the text is cut, all events together are what `parse_tool_calls` makes of the whole.
    Text waits only while it may still become a call; a call comes at once when it is complete.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        """Start an answer; `names` are the declared tools, None takes any name."""
        self._names = None if names is None else frozenset(names)
        self._prefixes = find_prefixes(self._names or ())
        # The piece being read and the place in it. What lies between `_from` and `_at`, and
        # before that in `_held`, has been read and is neither text nor call yet.
        self._piece, self._at, self._from = "", 0, 0
        self._held: list[str] = []
        self._is_text = False  # what is being read is text, however it goes on
        self._pending: ToolCall | None = None  # complete, if the answer ends here
        self._follows_call = False
        self._code = CodeFinder()
        self._text: list[str] = []
        self._events: list[TextDelta | CallDelta] = []
        self._calls = 0
        self._reader = self._read()
        next(self._reader)

    def push(self, text: str) -> list[TextDelta | CallDelta]:
        """Take the next piece of the answer and return what it makes sure."""
        self._reader.send(text)
        return self._take_events()

    def finish(self) -> list[TextDelta | CallDelta]:
        """Say that the answer has ended, and return what waited. Then the stream is used up."""
        self._reader.close()
        if self._pending is not None:
            self._commit(self._pending)
        elif not (self._follows_call and "".join(self._held).isspace()):
            self._pass()
        return self._take_events()

    # Where text and calls go.

    def _take_events(self) -> list[TextDelta | CallDelta]:
        self._flush_text()
        events, self._events = self._events, []
        return events

    def _flush_text(self) -> None:
        if self._text:
            self._events.append(TextDelta("".join(self._text)))
            self._text = []

    def _pass(self) -> None:
        """What was read is text."""
        text = "".join([*self._held, self._piece[self._from : self._at]])
        self._drop()
        if text:
            self._text.append(text)
            self._code.read(text)
            self._follows_call = False

    def _commit(self, call: ToolCall) -> None:
        """What was read is a call."""
        self._drop()
        self._flush_text()
        self._events.append(CallDelta(self._calls, call))
        self._calls += 1
        self._follows_call = True
        self._pending = None

    def _drop(self) -> None:
        self._held.clear()
        self._from = self._at

    # Reading: generators, so that each can wait for the next piece wherever it is. All of them
    # stop at the first character that does not fit, and raise NotACallError there.

    def _peek(self) -> Reader:
        """The next character; it stays."""
        while self._at == len(self._piece):
            if self._is_text:
                self._pass()
            self._held.append(self._piece[self._from :])
            self._piece, self._at, self._from = "", 0, 0
            self._piece = yield
        return self._piece[self._at]

    def _peek_solid(self) -> Reader:
        """The next character that is no blank."""
        while (char := (yield from self._peek())).isspace():
            self._at += 1
        return char

    def _expect(self, wanted: str) -> Reader:
        if (yield from self._peek_solid()) != wanted:
            raise NotACallError
        self._at += 1

    def _end_item(self, closing: str) -> Reader:
        """Behind an item comes a comma, which is read, or what closes. Returns whether a comma."""
        char = yield from self._peek_solid()
        if char not in (",", closing):
            raise NotACallError
        self._at += char == ","
        return char == ","

    def _read(self) -> Reader:
        while True:
            yield from self._prose()
            try:
                yield from self._groups()
            except NotACallError:
                self._pass()
                self._is_text = False

    def _prose(self) -> Reader:
        """Pass text, up to a character that may begin a call."""
        while True:
            yield from self._peek()
            start = START.search(self._piece, self._at)
            self._at = start.start() if start else len(self._piece)
            self._pass()
            if start and not self._code.is_inside:
                return
            self._at += bool(start)
            self._pass()

    def _groups(self) -> Reader:
        """Groups of calls behind one another, until something else comes."""
        while True:
            yield from self._marks()
            char = yield from self._peek_solid()
            if char == "[":
                yield from self._call_list()
            elif char == "{":
                call = yield from self._object(0, is_call=True)
                if call is None:
                    raise NotACallError
                self._commit(call)
            else:
                raise NotACallError
            if (yield from self._peek_solid()) == ";":
                self._at += 1
                self._drop()
                yield from self._peek_solid()

    def _marks(self) -> Reader:
        while (yield from self._peek_solid()) == "<":
            mark = ""
            while mark not in PYTHON_MARKS:
                mark += yield from self._peek()
                if mark not in MARK_PREFIXES:
                    raise NotACallError
                self._at += 1
            if self._follows_call:  # else it is known only with the call that may come
                self._drop()

    def _call_list(self) -> Reader:
        self._at += 1
        calls = 0
        while True:
            char = yield from self._peek_solid()
            if calls:
                self._drop()
                if char == "]":  # behind a last comma
                    break
            call = yield from (
                self._object(1, is_call=True) if char == "{" else self._python_call()
            )
            if call is None:
                yield from self._end_item("]")
                yield from self._items("]", 1)
                raise NotACallError
            self._pending = call
            char = yield from self._peek_solid()
            self._pending = None
            yield from self._end_item("]")
            self._commit(call)
            calls += 1
            if char == "]":
                break
        self._at += 1
        self._drop()

    def _python_call(self) -> Reader:
        name = yield from self._name()
        if (yield from self._peek()) != "(":
            raise NotACallError
        self._at += 1
        arguments = {}
        while (yield from self._peek_solid()) != ")":
            key = yield from self._run(lambda char: char.isalnum() or char == "_", MAX_NAME)
            if not key.isidentifier() or key in arguments:
                raise NotACallError
            yield from self._expect("=")
            arguments[key] = yield from self._value(1)
            yield from self._end_item(")")
        self._at += 1
        return ToolCall(name, spell_json(arguments))

    def _name(self) -> Reader:
        name = ""
        while (char := (yield from self._peek())).isalnum() or char in "_.-":
            name += char
            if not self._may_become_name(name):
                raise NotACallError
            self._at += 1
        if not self._is_name(name):
            raise NotACallError
        return name

    def _may_become_name(self, text: str) -> bool:
        if self._names is not None:
            return text in self._prefixes
        return len(text) <= MAX_NAME and NAME.match(text) is not None

    def _is_name(self, text: str) -> bool:
        return NAME.fullmatch(text) is not None if self._names is None else text in self._names

    # Values.

    def _value(self, depth: int) -> Reader:
        if depth > MAX_DEPTH:
            raise NotACallError
        char = yield from self._peek_solid()
        if char in RUN:
            return (yield from self._string())
        if char in CLOSING:
            self._at += 1
            items, commas = yield from self._items(CLOSING[char], depth)
            self._at += 1
            return items[0] if char == "(" and len(items) == 1 and not commas else items
        if char == "{":
            return (yield from self._object(depth, is_call=False))
        if char in "+-." or char.isdecimal():
            return (yield from self._number())
        return (yield from self._word())

    def _items(self, closing: str, depth: int) -> Reader:
        """The values up to what closes them, and how many commas stood there."""
        items, commas = [], 0
        while (yield from self._peek_solid()) != closing:
            items.append((yield from self._value(depth + 1)))
            commas += yield from self._end_item(closing)
        return items, commas

    def _object(self, depth: int, *, is_call: bool) -> Reader:
        """A dict. If it is to be a call, then a `ToolCall`; or None, if all of it is text.

        An object that is no call is read to its end all the same: what it holds is no call either.
        """
        self._at += 1
        fields: dict[str, Any] = {}
        while (yield from self._peek_solid()) != "}":
            may_be_call = is_call and not self._is_text
            key = yield from self._key(depth, FIELD_PREFIXES.__contains__ if may_be_call else None)
            yield from self._expect(":")
            char = yield from self._peek_solid()
            if is_call and (char not in FIELDS.get(key, "") or key in fields):
                self._is_text = True
            if is_call and not self._is_text and key == "name":
                fields[key] = yield from self._string(self._may_become_name)
            else:
                fields[key] = yield from self._value(depth + 1)
            yield from self._end_item("}")
        self._at += 1
        if not is_call:
            return fields
        arguments = [fields[key] for key in ("parameters", "arguments") if key in fields]
        if (
            self._is_text
            or len(arguments) != 1
            or not self._is_name(fields.get("name", ""))
            or fields.get("type", "function") != "function"
        ):
            self._is_text = True
            return None
        return ToolCall(fields["name"], spell_json(arguments[0]))

    def _key(self, depth: int, fits: Callable[[str], bool] | None) -> Reader:
        """A key as JSON has it: the text of what is no text already."""
        if self._piece[self._at] in RUN:
            return (yield from self._string(fits))
        key = yield from self._value(depth + 1)
        if isinstance(key, list | dict):
            raise NotACallError
        return key if isinstance(key, str) else spell_json(key)

    def _string(self, fits: Callable[[str], bool] | None = None) -> Reader:
        """A string. Once it does not fit, what is being read is text."""
        quote = self._piece[self._at]
        self._at += 1
        parts: list[str] = []
        while (char := (yield from self._peek())) != quote:
            if char == "\\":
                parts.append((yield from self._escape()))
            else:
                run = RUN[quote].match(self._piece, self._at)
                assert run is not None
                parts.append(run[0])
                self._at = run.end()
            if fits is not None and not self._is_text and not fits("".join(parts)):
                self._is_text = True
        self._at += 1
        text = "".join(parts)
        if SURROGATE.search(text):
            # Pairs become the characters that they stand for, as in JSON; halves U+FFFD.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _escape(self) -> Reader:
        self._at += 1
        char = yield from self._peek()
        if char in "01234567":
            return chr(int((yield from self._run("01234567".__contains__, 3)), 8))
        self._at += 1
        if char not in HEX_DIGITS:
            return ESCAPES.get(char, "\\" + char)  # Python keeps the backslash of unknown ones
        digits = yield from self._run("0123456789abcdefABCDEF".__contains__, HEX_DIGITS[char])
        if len(digits) < HEX_DIGITS[char] or int(digits, 16) > sys.maxunicode:
            raise NotACallError
        return chr(int(digits, 16))

    def _number(self) -> Reader:
        text = yield from self._run("0123456789+-._eE".__contains__, MAX_DIGITS)
        if INTEGER.fullmatch(text):
            return int(text)
        if FLOAT.fullmatch(text):
            # JSON has no infinity: the largest number is the nearest to 1e999.
            largest = sys.float_info.max
            return max(-largest, min(largest, float(text)))
        raise NotACallError

    def _word(self) -> Reader:
        word = ""
        while (char := (yield from self._peek())).isalnum() or char == "_":
            word += char
            if word not in WORD_PREFIXES:
                raise NotACallError
            self._at += 1
        if word not in WORDS:
            raise NotACallError
        return WORDS[word]

    def _run(self, fits: Callable[[str], bool], most: int) -> Reader:
        """The characters that fit, at most so many."""
        chars: list[str] = []
        while len(chars) < most and fits((yield from self._peek())):
            chars.append(self._piece[self._at])
            self._at += 1
        return "".join(chars)


class CodeFinder:
    """Whether text, as far as it has been read, ends inside code.

    Code lies between fences, lines that begin with three backticks or more; or behind an odd
    number of backticks in its line.
    """

    def __init__(self) -> None:
        self._line: list[str] = []
        self._ticks = 0
        self._fence = ""  # the backticks that opened the one we are in

    @property
    def is_inside(self) -> bool:
        return self._fence != "" or self._ticks % 2 == 1

    def read(self, text: str) -> None:
        first, *others = text.split("\n")
        self._extend(first)
        for part in others:
            self._end_line()
            self._extend(part)

    def _extend(self, part: str) -> None:
        self._line.append(part)
        self._ticks += part.count("`")

    def _end_line(self) -> None:
        line = "".join(self._line).strip()
        fence = FENCE.fullmatch(line)
        if fence and not self._fence:
            self._fence = fence[1]
        elif fence and fence[1] == line and line.startswith(self._fence):
            # What closes is at least as long, and names no language.
            self._fence = ""
        self._line, self._ticks = [], 0


def spell_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def find_prefixes(words: Iterable[str]) -> frozenset[str]:
    """All beginnings of some words, the empty one and the words themselves among them."""
    return frozenset(word[:end] for word in words for end in range(len(word) + 1))


MARK_PREFIXES = find_prefixes(PYTHON_MARKS)
FIELD_PREFIXES = find_prefixes(FIELDS)
WORD_PREFIXES = find_prefixes(WORDS)
