"""Structured outputs: token bitmasks that keep an answer inside a JSON schema or a grammar.

A grammar is compiled once per request (`Grammar.compile`). Each answer then has a `Matcher`: it
computes a token bitmask before a token is sampled and accepts the token afterwards. The backend is
llguidance, which counts its steps and stops at a limit. Costs that it does not count are refused
here first, so no client's schema can hang a server or fill its memory.
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

# Limits in characters: a schema or all choices; a Lark grammar; a regular expression.
MAX_SCHEMA = 200_000
MAX_GRAMMAR = 20_000
MAX_REGEX = 10_000
# Limit on the states of all `multipleOf` of a schema. An automaton has one state per remainder, and
# several divisors in one place multiply. A hundred thousand states take a quarter of a second.
MAX_REMAINDERS = 100_000
# Limit on the properties of one object. llguidance fails at about 500 optional ones, after a time
# that grows with the square of their number.
MAX_FIELDS = 1000
# llguidance's own limits; with its defaults one request may take more than a second or a GB.
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Parts of llguidance's errors that are removed: special tokens' names, a note on missing details.
OMITTED_DETAILS = re.compile(
    r"; following special tokens are available: ⟦.*?⟧|<non-verbose/>", re.S
)
# Blanks between JSON's tokens: enough to indent, and never endless.
JSON_OPTIONS = {"whitespace_pattern": r"[ \t\r\n]{1,24}"}
# Appended to every grammar. By default llguidance looks ahead for as long as only one text can
# follow, to tokenize it as the tokenizer would. That never ends for `start: /b+/ /b+/`.
OPTIONS = '%llguidance {"no_forcing": true}'


class GrammarError(ValueError):
    """A schema, regular expression or grammar that cannot be enforced; names the field."""


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar; `start` begins an answer."""

    _vocabulary: "_Vocabulary" = field(repr=False)
    _prototype: Any = field(repr=False)  # an LLMatcher at its start, copied for each answer
    where: str

    @classmethod
    def compile(
        cls, tokenizer: Tokenizer, kind: str, value: Any = None, *, where: str | None = None
    ) -> "Grammar":
        """Compile one of these kinds:

        - `json`: `value` is a JSON schema, as an object or as its text;
        - `json_object`: any JSON object; `value` is ignored;
        - `regex`: a regular expression that the whole answer matches;
        - `choice`: a list of texts; the answer is one of them;
        - `grammar`: a Lark grammar in llguidance's dialect.

        Args:
            tokenizer: the checkpoint's.
            where: the field of the value, for errors; by default the kind.

        Raises:
            GrammarError: the value is wrong, or too large to be enforced.
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
        except (TypeError, ValueError) as error:  # invalid JSON, or a lone surrogate
            raise GrammarError(f"{where}: {format_error(str(error))}") from error
        grammar = cls(vocabulary, prototype, where)
        # Some grammars exceed the limits, or match nothing, only at their first token. Detect that
        # here, before other requests wait for the step.
        grammar.start(tokenizer.vocab_size, ()).mask()
        return grammar

    def start(self, vocab: int, stop_ids: Iterable[int]) -> "Matcher":
        """Begin an answer.

        Args:
            vocab: the model's vocabulary size, at least the tokenizer's; ids without a token are
                never allowed.
            stop_ids: the tokens that end an answer, allowed where the grammar may end.
        """
        return Matcher(self._vocabulary, self._prototype.deep_copy(), vocab, stop_ids, self.where)


class Matcher:
    """The state of one answer in a grammar."""

    def __init__(
        self,
        vocabulary: "_Vocabulary",
        backend: Any,
        vocab: int,
        stop_ids: Iterable[int],
        where: str,
    ) -> None:
        """Use `Grammar.start`, which documents the arguments."""
        assert vocab >= vocabulary.backend.vocab_size, (vocab, vocabulary.backend.vocab_size)
        self._vocabulary = vocabulary
        self._backend = backend
        self._vocab = vocab
        self._stop_ids = frozenset(stop_ids)
        self._stops_V = pack_ids(self._stop_ids, vocab)
        self._where = where
        self._has_stopped = False
        self._mask_V: np.ndarray | None = None  # cached until the next token is accepted

    @property
    def is_done(self) -> bool:
        """True if only a stop token may follow."""
        return self._has_stopped or (self._backend.is_stopped() and not self._backend.is_error())

    def mask(self) -> np.ndarray:
        """Compute the token bitmask of the next token: bit i % 32 of word i // 32 allows id i.

        Returns:
            A read-only int32 array [ceil(vocab / 32)] with at least one bit set.

        Raises:
            GrammarError: the grammar grew beyond the limits, or no token matches it.
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
            raise GrammarError(f"{self._where}: {format_error(self._backend.get_error())}")
        if self._has_stopped or self._backend.is_accepting():
            words_V |= self._stops_V
        elif not words_V.any():
            raise GrammarError(f"{self._where}: {format_error('NoExtension')}")
        return words_V

    def accept(self, token: int) -> bool:
        """Advance by a sampled token; return False, without a change, if `mask` forbids it.

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
    """Build the JSON schema of tool calls, whose answers `parse_tool_calls` parses.

    Args:
        tools: OpenAI-style function definitions.
        name: the one tool to call, once. Without it the schema is a list of at least one call.
        is_parallel: allow more than one call in the list.

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
    limit = {} if is_parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **limit, "items": {"anyOf": calls}}


def _call_schema(function: dict[str, Any], pointer: str) -> dict[str, Any]:
    """Build the schema of one call, located at `pointer` in the whole schema."""
    nothing = {"properties": {}, "additionalProperties": False}
    parameters = _rebase_references(
        function.get("parameters") or nothing, f"{pointer}/properties/parameters"
    )
    # The references are rebased; the schema's own base URI would make them wrong.
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


def _rebase_references(schema: Any, pointer: str) -> Any:
    """Rebase a schema's references to itself, "#/...", for its location at `pointer`."""
    if isinstance(schema, dict):
        return {
            key: pointer + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _rebase_references(value, pointer)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_rebase_references(item, pointer) for item in schema]
    return schema


# One reader per kind: each turns a client's value into a Lark grammar in llguidance's dialect.


def _read_schema(value: Any, where: str) -> str:
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    check_size(text, MAX_SCHEMA, where)
    schema = json.loads(text)
    check_schema(schema, where)
    # Serialized again, so that llguidance parses exactly the checked schema.
    return f"start: %json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS}, allow_nan=False)}"


def _read_json_object(value: Any, where: str) -> str:
    return _read_schema({"type": "object"}, where)


def _read_regex(value: Any, where: str) -> str:
    check_text(value, MAX_REGEX, where)
    # In Lark's syntax; \d matches 0 to 9 only, not the digits of all scripts.
    return f"start: /{import_llguidance().regex_to_lark(value, 'd')}/"


def _read_choice(value: Any, where: str) -> str:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if not is_list or not all(isinstance(item, str) for item in value):
        raise GrammarError(f"{where}: must be a list with at least one text.")
    check_size("".join(value), MAX_SCHEMA, where)
    return f"start: {' | '.join(json.dumps(item, ensure_ascii=False) for item in value)}"


def _read_lark(value: Any, where: str) -> str:
    check_text(value, MAX_GRAMMAR, where)
    # A schema inside a grammar is not checked, and %llguidance can switch limits off.
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


def check_text(value: Any, limit: int, where: str) -> None:
    """Refuse a value that is not a non-empty string of at most `limit` characters."""
    if not isinstance(value, str) or not value:
        raise GrammarError(f"{where}: must be a text that is not empty.")
    check_size(value, limit, where)


def check_size(text: str, limit: int, where: str) -> None:
    """Refuse a text of more than `limit` characters."""
    if len(text) > limit:
        raise GrammarError(
            f"{where}: {len(text)} characters are more than the {limit} that can be compiled; "
            "shorten it."
        )


def check_schema(schema: Any, where: str) -> None:
    """Refuse values that are not schemas, and schemas with costs that llguidance does not count."""
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
    """Iterate over all fields of all objects inside a value of JSON types."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield from value.items()
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


def format_error(error: str) -> str:
    """Format llguidance's multi-line error as one line of at most 300 characters."""
    if error.startswith("NoExtension"):
        return "no text matches it; correct it."
    line = " ".join(OMITTED_DETAILS.sub("", error).split())
    return line if len(line) <= 300 else f"{line[:300]}..."


# The vocabulary in llguidance's form.


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """A tokenizer's tokens: llguidance's trie, and the bitmask of the plain-text tokens."""

    backend: Any
    plain_V: np.ndarray


class _Tokens:
    """The tokenizer interface that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # llguidance recognizes special tokens by a leading byte 0xFF and their name. No grammar can
        # contain these names, so no grammar can require a special token.
        self.tokens = [
            b"\xff<%d>" % i if tokenizer.is_special(i) else tokenizer.token_bytes(i)
            for i in range(tokenizer.vocab_size)
        ]
        # llguidance needs an end token. A Matcher handles the real stop tokens, so any special
        # token will do.
        self.eos_token_id = tokenizer.bos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


@lru_cache(maxsize=4)  # a server has one tokenizer; Llama 4's takes seconds
def _read_vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    llguidance = import_llguidance()
    tokens = _Tokens(tokenizer)
    backend = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
    plain = (i for i, token in enumerate(tokens.tokens) if token and not tokenizer.is_special(i))
    return _Vocabulary(backend, pack_ids(plain, tokenizer.vocab_size))


def pack_ids(ids: Iterable[int], vocab: int) -> np.ndarray:
    """Pack ids below `vocab` into a bitmask, int32 [ceil(vocab / 32)]."""
    bits_V = np.zeros(-(-vocab // 32) * 32, bool)
    bits_V[list(ids)] = True
    return np.packbits(bits_V, bitorder="little").view("<i4").astype(np.int32)


def import_llguidance() -> Any:
    """Import llguidance, or say how to install it."""
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            'Structured outputs need llguidance: run pip install "l4jax[serve]".'
        ) from error
    return llguidance
