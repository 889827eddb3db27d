"""Laws of prose and size: the package speaks in the field's words, and its functions are short."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("l4jax", "sharding", "scripts", "tests")
LINES_OF_FUNCTION = 100
LINES_OF_KERNEL_FUNCTION = 120

# Coined words, and the field's word for each. Words that have an ordinary sense, too, are given as
# the phrases that were coined with them.
COINED = {
    r"\bdoors?\b": "command",
    r"\bfloors? (of|below|above|there)\b": "level",
    r"\bticket\b": "request handle",
    r"\btally|tallies\b": "usage",
    r"\btypist\b": "fake engine",
    r"\bspeller\b": "formatter",
    r"\banew\b": "again",
    r"\b(whole|chunk)_(pages|tables?)\b": "global / local page table",
    r"\bbehind \d": "with N tokens of context",
    r"\badjust(ed|ments?) (rows?|logits)\b": "logits processors",
    r"\bmultipliers\b": "compute warpgroups",
    r"(?<![\"'])\b(nobody|somebody)\b": "no request, a request",
}
# Strings of training data, templates and goldens are data, not prose.
DATA = {"l4jax/train/prose.txt", "tests/test_words.py"}


def list_sources() -> list[Path]:
    """Python files and documents of the repository, without data."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    documents = [*ROOT.glob("*.md"), *(ROOT / "l4jax").rglob("*.md")]
    return sorted(path for path in (*files, *documents) if str(path.relative_to(ROOT)) not in DATA)


def list_functions(path: Path) -> Iterator[tuple[str, int]]:
    """The name and the number of lines of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("pattern", COINED)
def test_the_field_has_a_word_for_it(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in list_sources()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(pattern, line, flags=re.IGNORECASE)
    ]
    assert not found, f"write {COINED[pattern]!r}:\n" + "\n".join(found)


def test_functions_fit_on_a_page() -> None:
    long = []
    for path in list_sources():
        if path.suffix != ".py":
            continue
        is_kernel = "kernels" in path.relative_to(ROOT).parts[:2]
        limit = LINES_OF_KERNEL_FUNCTION if is_kernel else LINES_OF_FUNCTION
        long += [
            f"{path.relative_to(ROOT)}: {name} has {lines} lines"
            for name, lines in list_functions(path)
            if lines > limit
        ]
    assert not long, "\n".join(long)
