"""The prose of the code is plain: docstrings and comments with few of the words and openings that hide the subject.

The limits are for the package as a whole, and for all other code as a whole: a sentence may use any of the words.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from language import LIMITS, WORDS, rates

ROOT = Path(__file__).parent.parent

CLAUSE = re.compile(r"(What|Whether|Who|Whose|How|Where|When|Why|That|Those|One (that|which|who)|Somebody|Nobody)\b")
MOST_CLAUSES = 4
"""The most docstrings of a part that open with a clause, not with an imperative or a noun."""

Prose = list[tuple[int, str]]


@cache
def tokens_of(source: str) -> list[tokenize.TokenInfo]:
    """Return the tokens of a module. Cython's are close enough to Python's."""
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def docstrings_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield each docstring, also of attributes, and the number of its first line."""
    before, line = tokenize.NEWLINE, ""
    for token in tokens_of(source):
        is_statement = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        is_c = line.startswith("cdef extern")
        if token.type == tokenize.STRING and token.string.startswith('"""') and is_statement and not is_c:
            yield token.start[0], inspect.cleandoc(ast.literal_eval(token.string))
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.type
        if token.type == tokenize.NEWLINE:
            line = token.line


def prose_of(source: str) -> Prose:
    """Return the lines of the docstrings and comments of a module, with their numbers."""
    lines = [pair for start, text in docstrings_of(source) for pair in enumerate(text.splitlines(), start)]
    comments = [
        (each.start[0], each.string.lstrip("# ")) for each in tokens_of(source) if each.type == tokenize.COMMENT
    ]
    return sorted([*lines, *comments])


def modules(*patterns: str) -> dict[str, str]:
    """Return the source of each module by its path."""
    files = sorted(file for pattern in patterns for file in ROOT.glob(pattern))
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


PARTS = {
    "package": modules("geventaudit/**/*.py", "geventaudit/**/*.pyx"),
    "others": modules("*.py", "benchmarks/**/*.py", "docs/*.py", "docs/_ext/*.py", "examples/**/*.py", "tests/**/*.py"),
}
PROSE = {part: {name: prose_of(source) for name, source in sources.items()} for part, sources in PARTS.items()}


def worst(prose: dict[str, Prose], word: str) -> list[str]:
    """Return the lines with *word*, those of the module with the most of them first."""
    pattern = WORDS[word]
    found = {name: [line for line in lines if pattern.search(line[1])] for name, lines in prose.items()}
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [f"{name}:{number}: {text.strip()}" for name, lines in ordered for number, text in lines]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("word", LIMITS)
def test_the_prose_is_plain(part: str, word: str) -> None:
    rate = rates(" ".join(text for lines in PROSE[part].values() for _, text in lines))[word]
    assert rate <= LIMITS[word], "\n".join([f"{word}: {rate:.1f} in 1,000 words", *worst(PROSE[part], word)[:30]])


@pytest.mark.parametrize("part", PARTS)
def test_docstrings_open_with_an_imperative_or_a_noun(part: str) -> None:
    clauses = [
        f"{name}:{number}: {text.splitlines()[0]}"
        for name, source in PARTS[part].items()
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
    assert CLAUSE.match("One that waits.")
    assert not CLAUSE.match("One record.")


def test_docstrings_of_attributes_and_of_cython_count_and_c_does_not() -> None:
    c = 'cdef extern from *:\n    """\n    // what\n    """\n'
    source = f'{c}\ncdef int f():  # who\n    """Add."""\n\nA = 1\n"""A number."""\n'
    assert list(docstrings_of(source)) == [(7, "Add."), (10, "A number.")]
    assert prose_of(source) == [(6, "who"), (7, "Add."), (10, "A number.")]


def test_the_worst_module_comes_first() -> None:
    prose = {"a.py": [(1, "what")], "b.py": [(2, "what"), (3, "else"), (4, "What")]}
    assert worst(prose, "what") == ["b.py:2: what", "b.py:4: What", "a.py:1: what"]
