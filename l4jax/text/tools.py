"""The tool call parser, for complete and streamed answers.

Llama 4 writes calls in two formats, and both are parsed:

    [get_weather(city="Paris", days=[1, 2]), maps.search(q='cafe')]
    {"name": "get_weather", "parameters": {"city": "Paris"}}

The JSON format may also use "arguments", a list, or several objects in sequence. There is one
parser, `ToolCallParser`; `parse_tool_calls` pushes a complete answer through it. Each character is
read once, or twice where a candidate is not a call, so the time is linear in the text. Nothing is
evaluated.
"""

import json
import re
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

PYTHON_TOKENS = ("<|python_start|>", "<|python_end|>")
CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
# The fields of a JSON call, each with the characters that may begin its value.
FIELDS = {"name": "\"'", "parameters": "{", "arguments": "{", "type": "\"'"}
CLOSING = {"[": "]", "(": ")"}

# Real arguments do not nest deeper.
MAX_DEPTH = 64
# OpenAI allows names of 64 characters; dotted names are longer.
MAX_NAME = 128
# Python refuses to parse integers of more than 4300 digits.
MAX_DIGITS = 4000

NAME = re.compile(r"[^\W\d][\w-]*(?:\.[^\W\d][\w-]*)*")
CALL_START = re.compile(r"[\[{<]")
UNESCAPED = {'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\\]+")}
INTEGER = re.compile(r"[+-]?(?:0+|[1-9](?:_?[0-9])*)")
FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?")
SURROGATE = re.compile("[\ud800-\udfff]")
FENCE = re.compile(r"(```+)[^`]*")

# Python's escapes include JSON's except "\/"; Python would keep that backslash.
ESCAPES = {
    **{char: char for char in "\"'\\/"},
    **{"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""},
}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}

Parser = Generator[None, str, Any]  # yields until the next piece of text is sent


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name, and its arguments as a JSON object in a string."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """A parsed answer: its text without the calls, and the calls in order."""

    content: str
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A complete call; `index` counts the calls of the answer from 0."""

    index: int
    call: ToolCall


class NotACallError(Exception):
    """The candidate, all characters since the last text or call, is text."""


def parse_tool_calls(text: str, names: Iterable[str] | None = None) -> Parsed:
    """Parse the tool calls of a complete answer.

    Text around the calls stays. The delimiters of calls go: brackets, `;`, the tokens
    `<|python_start|>` and `<|python_end|>` next to a call, and trailing blanks after the last call.
    A call that the answer's end truncates is text; the calls before it are calls. Code, in
    backticks or between fences, is text.

    Args:
        text: the answer.
        names: the declared tools; a call of another name is text. None accepts any name.
    """
    parser = ToolCallParser(names)
    events = [*parser.push(text), *parser.finish()]
    return Parsed(
        "".join(event.text for event in events if isinstance(event, TextDelta)),
        tuple(event.call for event in events if isinstance(event, CallDelta)),
    )


class ToolCallParser:
    """Streaming tool call parser: turns pieces of text into text and call events.

    Events do not depend on the boundaries of the pieces: together they equal the result of
    `parse_tool_calls`. Text is buffered only while it may still become a call. A call is emitted
    with its last character.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        """Start an answer; `names` are the declared tools, None accepts any name."""
        self._tool_names = None if names is None else frozenset(names)
        self._prefixes = list_prefixes(self._tool_names or ())
        # The current piece and the position in it. The candidate, which may be text or a call, is
        # `_buffered` and then the current piece from `_start` to `_position`.
        self._piece, self._position, self._start = "", 0, 0
        self._buffered: list[str] = []
        self._is_text = False  # the candidate is text, whatever follows
        self._pending: ToolCall | None = None  # emitted if the answer ends here
        self._follows_call = False
        self._code = CodeDetector()
        self._text: list[str] = []
        self._events: list[TextDelta | CallDelta] = []
        self._calls = 0
        self._parser = self._parse()
        next(self._parser)

    def push(self, text: str) -> list[TextDelta | CallDelta]:
        """Take the next piece of the answer and return the events that it completes."""
        self._parser.send(text)
        return self._take_events()

    def finish(self) -> list[TextDelta | CallDelta]:
        """End the answer and return the remaining events; the parser cannot be reused."""
        self._parser.close()
        if self._pending is not None:
            self._emit_call(self._pending)
        elif not (self._follows_call and "".join(self._buffered).isspace()):
            self._emit_text()
        return self._take_events()

    # Events.

    def _take_events(self) -> list[TextDelta | CallDelta]:
        self._flush_text()
        events, self._events = self._events, []
        return events

    def _flush_text(self) -> None:
        if self._text:
            self._events.append(TextDelta("".join(self._text)))
            self._text = []

    def _emit_text(self) -> None:
        """Emit the candidate as text."""
        text = "".join([*self._buffered, self._piece[self._start : self._position]])
        self._discard()
        if text:
            self._text.append(text)
            self._code.push(text)
            self._follows_call = False

    def _emit_call(self, call: ToolCall) -> None:
        """Emit a call in place of the candidate."""
        self._discard()
        self._flush_text()
        self._events.append(CallDelta(self._calls, call))
        self._calls += 1
        self._follows_call = True
        self._pending = None

    def _discard(self) -> None:
        self._buffered.clear()
        self._start = self._position

    # The grammar's rules are generators, so that each can wait for the next piece at any point.
    # They stop at the first character that does not match and raise NotACallError there.

    def _peek(self) -> Parser:
        """Return the next character without consuming it."""
        while self._position == len(self._piece):
            if self._is_text:
                self._emit_text()
            self._buffered.append(self._piece[self._start :])
            self._piece, self._position, self._start = "", 0, 0
            self._piece = yield
        return self._piece[self._position]

    def _peek_nonblank(self) -> Parser:
        """Skip blanks and return the next character without consuming it."""
        while (char := (yield from self._peek())).isspace():
            self._position += 1
        return char

    def _expect(self, wanted: str) -> Parser:
        if (yield from self._peek_nonblank()) != wanted:
            raise NotACallError
        self._position += 1

    def _end_item(self, closing: str) -> Parser:
        """Consume the comma after an item, or stop before `closing`; return True for a comma."""
        char = yield from self._peek_nonblank()
        if char not in (",", closing):
            raise NotACallError
        self._position += char == ","
        return char == ","

    def _parse(self) -> Parser:
        while True:
            yield from self._skip_text()
            try:
                yield from self._parse_call_groups()
            except NotACallError:
                self._emit_text()
                self._is_text = False

    def _skip_text(self) -> Parser:
        """Emit text up to a character that may begin a call."""
        while True:
            yield from self._peek()
            start = CALL_START.search(self._piece, self._position)
            self._position = start.start() if start else len(self._piece)
            self._emit_text()
            if start and not self._code.is_inside:
                return
            self._position += bool(start)
            self._emit_text()

    def _parse_call_groups(self) -> Parser:
        """Parse consecutive groups of calls."""
        while True:
            yield from self._skip_python_tokens()
            char = yield from self._peek_nonblank()
            if char == "[":
                yield from self._parse_call_list()
            elif char == "{":
                call = yield from self._parse_object(0, is_call=True)
                if call is None:
                    raise NotACallError
                self._emit_call(call)
            else:
                raise NotACallError
            if (yield from self._peek_nonblank()) == ";":
                self._position += 1
                self._discard()
                yield from self._peek_nonblank()

    def _skip_python_tokens(self) -> Parser:
        while (yield from self._peek_nonblank()) == "<":
            token = ""
            while token not in PYTHON_TOKENS:
                token += yield from self._peek()
                if token not in PYTHON_TOKEN_PREFIXES:
                    raise NotACallError
                self._position += 1
            if self._follows_call:  # otherwise the next call decides
                self._discard()

    def _parse_call_list(self) -> Parser:
        self._position += 1
        calls = 0
        while True:
            char = yield from self._peek_nonblank()
            if calls:
                self._discard()
                if char == "]":  # after a trailing comma
                    break
            call = yield from (
                self._parse_object(1, is_call=True) if char == "{" else self._parse_python_call()
            )
            if call is None:
                yield from self._end_item("]")
                yield from self._parse_items("]", 1)
                raise NotACallError
            self._pending = call
            char = yield from self._peek_nonblank()
            self._pending = None
            yield from self._end_item("]")
            self._emit_call(call)
            calls += 1
            if char == "]":
                break
        self._position += 1
        self._discard()

    def _parse_python_call(self) -> Parser:
        name = yield from self._parse_name()
        if (yield from self._peek()) != "(":
            raise NotACallError
        self._position += 1
        arguments = {}
        while (yield from self._peek_nonblank()) != ")":
            key = yield from self._take_while(lambda char: char.isalnum() or char == "_", MAX_NAME)
            if not key.isidentifier() or key in arguments:
                raise NotACallError
            yield from self._expect("=")
            arguments[key] = yield from self._parse_value(1)
            yield from self._end_item(")")
        self._position += 1
        return ToolCall(name, format_json(arguments))

    def _parse_name(self) -> Parser:
        name = ""
        while (char := (yield from self._peek())).isalnum() or char in "_.-":
            name += char
            if not self._may_become_name(name):
                raise NotACallError
            self._position += 1
        if not self._is_name(name):
            raise NotACallError
        return name

    def _may_become_name(self, text: str) -> bool:
        if self._tool_names is not None:
            return text in self._prefixes
        return len(text) <= MAX_NAME and NAME.match(text) is not None

    def _is_name(self, text: str) -> bool:
        if self._tool_names is not None:
            return text in self._tool_names
        return NAME.fullmatch(text) is not None

    # Values.

    def _parse_value(self, depth: int) -> Parser:
        if depth > MAX_DEPTH:
            raise NotACallError
        char = yield from self._peek_nonblank()
        if char in UNESCAPED:
            return (yield from self._parse_string())
        if char in CLOSING:
            self._position += 1
            items, commas = yield from self._parse_items(CLOSING[char], depth)
            self._position += 1
            return items[0] if char == "(" and len(items) == 1 and not commas else items
        if char == "{":
            return (yield from self._parse_object(depth, is_call=False))
        if char in "+-." or char.isdecimal():
            return (yield from self._parse_number())
        return (yield from self._parse_constant())

    def _parse_items(self, closing: str, depth: int) -> Parser:
        """Parse values up to `closing`; return them and the number of commas."""
        items, commas = [], 0
        while (yield from self._peek_nonblank()) != closing:
            items.append((yield from self._parse_value(depth + 1)))
            commas += yield from self._end_item(closing)
        return items, commas

    def _parse_object(self, depth: int, *, is_call: bool) -> Parser:
        """Parse an object; with `is_call`, return a `ToolCall`, or None if all of it is text.

        An object that is not a call is parsed to its end: objects inside it are not calls either.
        """
        self._position += 1
        fields: dict[str, Any] = {}
        while (yield from self._peek_nonblank()) != "}":
            may_be_call = is_call and not self._is_text
            key = yield from self._parse_key(
                depth, FIELD_PREFIXES.__contains__ if may_be_call else None
            )
            yield from self._expect(":")
            char = yield from self._peek_nonblank()
            if is_call and (char not in FIELDS.get(key, "") or key in fields):
                self._is_text = True
            if is_call and not self._is_text and key == "name":
                fields[key] = yield from self._parse_string(self._may_become_name)
            else:
                fields[key] = yield from self._parse_value(depth + 1)
            yield from self._end_item("}")
        self._position += 1
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
        return ToolCall(fields["name"], format_json(arguments[0]))

    def _parse_key(self, depth: int, accepts: Callable[[str], bool] | None) -> Parser:
        """Parse a key; a key that is not a string becomes its JSON text."""
        if self._piece[self._position] in UNESCAPED:
            return (yield from self._parse_string(accepts))
        key = yield from self._parse_value(depth + 1)
        if isinstance(key, list | dict):
            raise NotACallError
        return key if isinstance(key, str) else format_json(key)

    def _parse_string(self, accepts: Callable[[str], bool] | None = None) -> Parser:
        """Parse a string; once `accepts` rejects its beginning, the candidate is text."""
        quote = self._piece[self._position]
        self._position += 1
        parts: list[str] = []
        while (char := (yield from self._peek())) != quote:
            if char == "\\":
                parts.append((yield from self._parse_escape()))
            else:
                run = UNESCAPED[quote].match(self._piece, self._position)
                assert run is not None
                parts.append(run[0])
                self._position = run.end()
            if accepts is not None and not self._is_text and not accepts("".join(parts)):
                self._is_text = True
        self._position += 1
        text = "".join(parts)
        if SURROGATE.search(text):
            # A surrogate pair becomes its character, as in JSON; a lone surrogate becomes U+FFFD.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _parse_escape(self) -> Parser:
        self._position += 1
        char = yield from self._peek()
        if char in "01234567":
            return chr(int((yield from self._take_while("01234567".__contains__, 3)), 8))
        self._position += 1
        if char not in HEX_DIGITS:
            return ESCAPES.get(char, "\\" + char)  # as Python, for unknown escapes
        digits = yield from self._take_while(
            "0123456789abcdefABCDEF".__contains__, HEX_DIGITS[char]
        )
        if len(digits) < HEX_DIGITS[char] or int(digits, 16) > sys.maxunicode:
            raise NotACallError
        return chr(int(digits, 16))

    def _parse_number(self) -> Parser:
        text = yield from self._take_while("0123456789+-._eE".__contains__, MAX_DIGITS)
        if INTEGER.fullmatch(text):
            return int(text)
        if FLOAT.fullmatch(text):
            # JSON has no infinity; the largest float is nearest to 1e999.
            largest = sys.float_info.max
            return max(-largest, min(largest, float(text)))
        raise NotACallError

    def _parse_constant(self) -> Parser:
        word = ""
        while (char := (yield from self._peek())).isalnum() or char == "_":
            word += char
            if word not in CONSTANT_PREFIXES:
                raise NotACallError
            self._position += 1
        if word not in CONSTANTS:
            raise NotACallError
        return CONSTANTS[word]

    def _take_while(self, accepts: Callable[[str], bool], limit: int) -> Parser:
        """Consume accepted characters, at most `limit`."""
        chars: list[str] = []
        while len(chars) < limit and accepts((yield from self._peek())):
            chars.append(self._piece[self._position])
            self._position += 1
        return "".join(chars)


class CodeDetector:
    """Tracks whether streamed text ends inside code.

    Code is between fences (lines that begin with three backticks or more) or after an odd number of
    backticks in its line.
    """

    def __init__(self) -> None:
        self._line: list[str] = []
        self._ticks = 0
        self._fence = ""  # the backticks that opened the current fence

    @property
    def is_inside(self) -> bool:
        return self._fence != "" or self._ticks % 2 == 1

    def push(self, text: str) -> None:
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
            # A closing fence is at least as long as the opening one and names no language.
            self._fence = ""
        self._line, self._ticks = [], 0


def format_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def list_prefixes(words: Iterable[str]) -> frozenset[str]:
    """List all prefixes of the words, including the empty string and the words."""
    return frozenset(word[:end] for word in words for end in range(len(word) + 1))


PYTHON_TOKEN_PREFIXES = list_prefixes(PYTHON_TOKENS)
FIELD_PREFIXES = list_prefixes(FIELDS)
CONSTANT_PREFIXES = list_prefixes(CONSTANTS)
