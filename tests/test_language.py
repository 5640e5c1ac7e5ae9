"""The prose of the package is plain: docstrings and comments with few of the words and openings that hide the subject.

The limits are for the package as a whole: a sentence may use any of the words.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from language import LIMITS, WORDS, rates

ROOT = Path(__file__).parent.parent

CLAUSE = re.compile(r"(What|Whether|Who|Whose|How|Where|When|Why|That|Those|One|Somebody|Nobody)\b")
MOST_CLAUSES = 8
"""The most docstrings that open with a clause, not with an imperative or a noun."""

Prose = list[tuple[int, str]]


def docstrings_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield each docstring and the number of its first line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, text


def prose_of(source: str) -> Prose:
    """Return the lines of the docstrings and comments of a module, with their numbers."""
    lines = [pair for start, text in docstrings_of(source) for pair in enumerate(text.splitlines(), start)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [(each.start[0], each.string.lstrip("# ")) for each in tokens if each.type == tokenize.COMMENT]
    return sorted([*lines, *comments])


MODULES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted((ROOT / "geventaudit").rglob("*.py"))
    if "_build" not in path.parts
}
PROSE = {name: prose_of(source) for name, source in MODULES.items()}


def worst(prose: dict[str, Prose], word: str) -> list[str]:
    """Return the lines with *word*, those of the module with the most of them first."""
    pattern = WORDS[word]
    found = {name: [line for line in lines if pattern.search(line[1])] for name, lines in prose.items()}
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [f"{name}:{number}: {text.strip()}" for name, lines in ordered for number, text in lines]


@pytest.mark.parametrize("word", LIMITS)
def test_the_prose_is_plain(word: str) -> None:
    rate = rates(" ".join(text for lines in PROSE.values() for _, text in lines))[word]
    assert rate <= LIMITS[word], "\n".join([f"{word}: {rate:.1f} in 1,000 words", *worst(PROSE, word)[:30]])


def test_docstrings_open_with_an_imperative_or_a_noun() -> None:
    clauses = [
        f"{name}:{number}: {text.splitlines()[0]}"
        for name, source in MODULES.items()
        for number, text in docstrings_of(source)
        if CLAUSE.match(text)
    ]
    assert len(clauses) <= MOST_CLAUSES, "\n".join(clauses)


def test_docstrings_and_comments_count_and_code_does_not() -> None:
    source = '"""What it does.\n\nNo more.\n"""\n\nWHAT = "what"\n\n\ndef what() -> None:\n    pass  # what a day\n'
    assert prose_of(source) == [(1, "What it does."), (2, ""), (3, "No more."), (10, "what a day")]
    assert list(docstrings_of(source)) == [(1, "What it does.\n\nNo more.")]
    assert CLAUSE.match("What it does.")
    assert not CLAUSE.match("Whatever")


def test_the_worst_module_comes_first() -> None:
    prose = {"a.py": [(1, "what")], "b.py": [(2, "what"), (3, "else"), (4, "What")]}
    assert worst(prose, "what") == ["b.py:2: what", "b.py:4: What", "a.py:1: what"]
