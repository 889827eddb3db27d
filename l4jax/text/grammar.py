"""Structured outputs: which tokens may come next, so that the answer fits a schema or a grammar.

A grammar is compiled once for a request (`Grammar.compile`); each answer then has a `Matcher`,
which gives a mask before a token is sampled and takes the token after. The work is done by
llguidance, which counts its steps and gives up beyond a limit. What it does not count is refused
here first, so no schema from outside can hang a server or fill its memory.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from l4jax.text.tokenizer import Tokenizer

# Characters of a schema or of all choices, of a Lark grammar, of a regular expression.
MAX_SCHEMA = 200_000
MAX_GRAMMAR = 20_000
MAX_REGEX = 10_000
# States that all `multipleOf` of a schema may need: an automaton of remainders has one for each
# remainder, and several in one place multiply. A hundred thousand take a quarter of a second.
MAX_REMAINDERS = 100_000
# Fields of one object. llguidance gives up at about 500 that may be left out, but first takes time
# that grows with their square.
MAX_FIELDS = 1000
# llguidance's own limits, where its defaults let one request take more than a second or a GB.
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Parts of llguidance's errors: the names of special tokens, and a note that details are missing.
LEFT_OUT = re.compile(r"; following special tokens are available: ⟦.*?⟧|<non-verbose/>", re.S)
# Blanks between JSON's tokens: enough to indent, and no way to go on for ever.
JSON_OPTIONS = {"whitespace_pattern": r"[ \t\r\n]{1,24}"}
# Behind every grammar. llguidance would look as far ahead as only one text can follow, to have it
# in the tokens that the tokenizer would choose. That is for ever in `start: /b+/ /b+/`.
OPTIONS = '%llguidance {"no_forcing": true}'


class GrammarError(ValueError):
    """A schema, regular expression or grammar that cannot be followed; names the field."""


@dataclass(frozen=True, eq=False)
class Grammar:
    """What an answer must look like, compiled; `start` begins an answer."""

    _vocabulary: "_Vocabulary" = field(repr=False)
    _prototype: Any = field(repr=False)  # an LLMatcher that nobody advances
    where: str

    @classmethod
    def compile(
        cls, tokenizer: Tokenizer, kind: str, value: Any = None, *, where: str | None = None
    ) -> "Grammar":
        """Compile one of these kinds:

        - `json`: `value` is a JSON schema, as an object or as its text;
        - `json_object`: any JSON object; `value` is not looked at;
        - `regex`: a regular expression that the whole answer matches;
        - `choice`: a list of texts, of which the answer is one;
        - `grammar`: a Lark grammar as llguidance reads it.

        Args:
            tokenizer: the checkpoint's.
            where: the field that the value came from, for errors; the kind if it is not given.

        Raises:
            GrammarError: the value is wrong, or too large to be followed.
            ImportError: llguidance is not installed.
        """
        llguidance = import_llguidance()
        where = where or kind
        if kind not in KINDS:
            raise GrammarError(f"{where}: {kind!r} is not one of {', '.join(KINDS)}.")
        vocabulary = _read_vocabulary(tokenizer)
        limits = llguidance.LLParserLimits(**LIMITS)
        try:
            text = f"{KINDS[kind](value, where)}\n{OPTIONS}\n"
            prototype = llguidance.LLMatcher(vocabulary.backend, text, log_level=0, limits=limits)
        except GrammarError:
            raise
        except RecursionError as error:
            raise GrammarError(f"{where}: nested too deeply; flatten it.") from error
        except (TypeError, ValueError) as error:  # no JSON, or half of a surrogate pair
            raise GrammarError(f"{where}: {spell_line(str(error))}") from error
        grammar = cls(vocabulary, prototype, where)
        # Some grammars show only at their first token that they are too large, or that nothing
        # fits them; better now than when others wait for the step.
        grammar.start(tokenizer.vocab_size, ()).mask()
        return grammar

    def start(self, vocab: int, stop_ids: Iterable[int]) -> "Matcher":
        """Begin an answer.

        Args:
            vocab: the model's, at least the tokenizer's; ids without a token are never allowed.
            stop_ids: the tokens that end an answer, allowed where the grammar may end.
        """
        return Matcher(self._vocabulary, self._prototype.deep_copy(), vocab, stop_ids, self.where)


class Matcher:
    """One answer on its way through a grammar."""

    def __init__(
        self,
        vocabulary: "_Vocabulary",
        backend: Any,
        vocab: int,
        stop_ids: Iterable[int],
        where: str,
    ) -> None:
        """Made by `Grammar.start`, which says what the arguments are."""
        assert vocab >= vocabulary.backend.vocab_size, (vocab, vocabulary.backend.vocab_size)
        self._vocabulary = vocabulary
        self._backend = backend
        self._vocab = vocab
        self._stop_ids = frozenset(stop_ids)
        self._stops_V = pack_ids(self._stop_ids, vocab)
        self._where = where
        self._has_stopped = False
        self._mask_V: np.ndarray | None = None  # until the next token is taken

    @property
    def is_done(self) -> bool:
        """Whether nothing but a stop token may follow."""
        return self._has_stopped or (self._backend.is_stopped() and not self._backend.is_error())

    def mask(self) -> np.ndarray:
        """The tokens that may come next, as int32 [ceil(vocab / 32)]: bit i % 32 of word i // 32.

        The array is read-only, and never empty.

        Raises:
            GrammarError: the grammar grew beyond the limits, or nothing fits it.
        """
        if self._mask_V is None:
            self._mask_V = self._compute_mask()
            self._mask_V.flags.writeable = False
        return self._mask_V

    def _compute_mask(self) -> np.ndarray:
        words_V = np.zeros_like(self._stops_V)
        if not self.is_done:
            known_V = words_V[: self._vocabulary.plain_V.size]
            self._backend.unsafe_compute_mask_ptr(known_V.ctypes.data, known_V.nbytes)
            known_V &= self._vocabulary.plain_V
        if self._backend.is_error():
            raise GrammarError(f"{self._where}: {spell_line(self._backend.get_error())}")
        if self._has_stopped or self._backend.is_accepting():
            words_V |= self._stops_V
        elif not words_V.any():
            raise GrammarError(f"{self._where}: {spell_line('NoExtension')}")
        return words_V

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; False, and nothing changes, if `mask` forbids it.

        Raises:
            GrammarError: as `mask`.
        """
        if self._has_stopped or not 0 <= token < self._vocab:
            return False
        if not self.mask()[token // 32] >> token % 32 & 1:
            return False
        if token in self._stop_ids:
            self._has_stopped = True
        elif self._backend.try_consume_tokens([token]) == 0:
            return False
        self._mask_V = None
        return True


def tool_schema(
    tools: Sequence[dict[str, Any]], name: str | None = None, *, is_parallel: bool = True
) -> dict[str, Any]:
    """The JSON schema of tool calls, which `parse_tool_calls` reads back.

    Args:
        tools: OpenAI-style function definitions.
        name: the one tool to call, once. Without it a list of at least one call is asked for.
        is_parallel: whether the list may hold more than one.

    Raises:
        GrammarError: no tool has that name, or parameters are nested too deeply.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if name is not None and name not in functions:
        raise GrammarError(
            f"tool_choice: no tool is named {name!r}; take one of {', '.join(functions)}."
        )
    try:
        if name is not None:
            return _call_schema(functions[name], "#")
        calls = [
            _call_schema(function, f"#/items/anyOf/{n}")
            for n, function in enumerate(functions.values())
        ]
    except RecursionError as error:
        raise GrammarError("tools: parameters are nested too deeply; flatten them.") from error
    most = {} if is_parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}


def _call_schema(function: dict[str, Any], pointer: str) -> dict[str, Any]:
    """The schema of one call, which stands at `pointer` in the whole schema."""
    nothing = {"properties": {}, "additionalProperties": False}
    parameters = _move_references(
        function.get("parameters") or nothing, f"{pointer}/properties/parameters"
    )
    # The references are moved, so where the schema was at home is of no use, and in the way.
    parameters = {k: v for k, v in parameters.items() if k not in ("$schema", "$id")}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "parameters": {**parameters, "type": "object"},
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _move_references(schema: Any, pointer: str) -> Any:
    """A schema with its references to itself, "#/...", as they read when it stands at `pointer`."""
    if isinstance(schema, dict):
        return {
            key: pointer + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _move_references(value, pointer)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_move_references(item, pointer) for item in schema]
    return schema


# The kinds: a value from outside to a grammar in Lark, as llguidance reads it.


def _read_schema(value: Any, where: str) -> str:
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    check_size(text, MAX_SCHEMA, where)
    schema = json.loads(text)
    check_schema(schema, where)
    # Written once more, so that llguidance reads exactly what was checked.
    return f"start: %json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS}, allow_nan=False)}"


def _read_json_object(value: Any, where: str) -> str:
    return _read_schema({"type": "object"}, where)


def _read_regex(value: Any, where: str) -> str:
    check_text(value, MAX_REGEX, where)
    # In Lark's spelling; \d means 0 to 9, and not the digits of all scripts.
    return f"start: /{import_llguidance().regex_to_lark(value, 'd')}/"


def _read_choice(value: Any, where: str) -> str:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if not is_list or not all(isinstance(item, str) for item in value):
        raise GrammarError(f"{where}: must be a list with at least one text.")
    check_size("".join(value), MAX_SCHEMA, where)
    return f"start: {' | '.join(json.dumps(item, ensure_ascii=False) for item in value)}"


def _read_lark(value: Any, where: str) -> str:
    check_text(value, MAX_GRAMMAR, where)
    # Of a schema inside, which is not checked; and what switches limits off.
    for word in ("multipleOf", "%llguidance"):
        if word in value:
            raise GrammarError(f"{where}: {word} is not allowed in a grammar; do without it.")
    return value


KINDS: dict[str, Callable[[Any, str], str]] = {
    "json": _read_schema,
    "json_object": _read_json_object,
    "regex": _read_regex,
    "choice": _read_choice,
    "grammar": _read_lark,
}


def check_text(value: Any, most: int, where: str) -> None:
    if not isinstance(value, str) or not value:
        raise GrammarError(f"{where}: must be a text that is not empty.")
    check_size(value, most, where)


def check_size(text: str, most: int, where: str) -> None:
    if len(text) > most:
        raise GrammarError(
            f"{where}: {len(text)} characters are more than the {most} that can be compiled; "
            "shorten it."
        )


def check_schema(schema: Any, where: str) -> None:
    """Refuse what is no schema, and what costs more than llguidance counts."""
    if not isinstance(schema, dict):
        raise GrammarError(f"{where}: a JSON schema is an object, not a {type(schema).__name__}.")
    divisors: set[Decimal] = set()
    patterns = 0
    for key, value in walk_fields(schema):
        if key == "multipleOf" and type(value) in (int, float):
            divisors.add(Decimal(str(value)).normalize())
        elif key == "properties" and isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise GrammarError(
                f"{where}: {len(value)} properties in one object, more than {MAX_FIELDS}; "
                "use fewer."
            )
        elif key == "pattern" and isinstance(value, str):
            patterns += len(value)
        elif key == "patternProperties" and isinstance(value, dict):
            patterns += sum(map(len, value))
    remainders = 1
    for divisor in divisors:
        remainders *= max(1, int("".join(map(str, divisor.as_tuple().digits))))
    if remainders > MAX_REMAINDERS:
        raise GrammarError(
            f"{where}: multipleOf needs {remainders} remainders, more than {MAX_REMAINDERS}; "
            "use smaller numbers, or fewer."
        )
    if patterns > MAX_REGEX:
        raise GrammarError(
            f"{where}: its patterns have {patterns} characters, more than the {MAX_REGEX} that "
            "can be compiled; shorten them."
        )


def walk_fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of all objects inside a value of JSON types."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield from value.items()
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


def spell_line(error: str) -> str:
    """llguidance's error, which draws on many lines, as one line of reasonable length."""
    if error.startswith("NoExtension"):
        return "no text fits it; mend it."
    line = " ".join(LEFT_OUT.sub("", error).split())
    return line if len(line) <= 300 else f"{line[:300]}..."


# The vocabulary, as llguidance wants it.


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """A tokenizer's tokens: llguidance's tree of them, and which are plain text, as a mask."""

    backend: Any
    plain_V: np.ndarray


class _Tokens:
    """The attributes that llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # llguidance looks special tokens up by name, and by the byte 0xFF in front of it. These
        # names nobody can write, and so no grammar can ask for a special token by name.
        self.tokens = [
            b"\xff<%d>" % i if tokenizer.is_special(i) else tokenizer.token_bytes(i)
            for i in range(tokenizer.vocab_size)
        ]
        # One that llguidance may use for "the end"; which tokens really stop is a Matcher's
        # business, so any special one will do.
        self.eos_token_id = tokenizer.bos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


@lru_cache(maxsize=4)  # a process has one, but for tests; the real one takes seconds to read
def _read_vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    llguidance = import_llguidance()
    tokens = _Tokens(tokenizer)
    backend = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
    plain = (i for i, token in enumerate(tokens.tokens) if token and not tokenizer.is_special(i))
    return _Vocabulary(backend, pack_ids(plain, tokenizer.vocab_size))


def pack_ids(ids: Iterable[int], vocab: int) -> np.ndarray:
    """Some ids below `vocab` as a mask: int32 [ceil(vocab / 32)]."""
    bits_V = np.zeros(-(-vocab // 32) * 32, bool)
    bits_V[list(ids)] = True
    return np.packbits(bits_V, bitorder="little").view("<i4").astype(np.int32)


def import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            'Structured outputs need llguidance: run pip install "l4jax[serve]".'
        ) from error
    return llguidance
