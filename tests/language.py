"""A counter of words that make prose hard to decode: the limits are per 1,000 words, and say where to look."""

from __future__ import annotations

import re

WORDS = {
    "what": re.compile(r"\bwhat\b", re.IGNORECASE),
    "who": re.compile(r"\b(?:who|whoever|whose|whom)\b", re.IGNORECASE),
    "tell": re.compile(r"\b(?:tell|tells|telling|told)\b", re.IGNORECASE),
    "body": re.compile(r"\b(?:somebody|nobody|anybody)\b", re.IGNORECASE),
}
LIMITS = {"what": 2.5, "who": 0.8, "tell": 0.5, "body": 0.3}
"""Occurrences per 1,000 words."""


def rates(text: str) -> dict[str, float]:
    """Return the occurrences of each of :data:`WORDS` per 1,000 words of *text*."""
    count = max(len(text.split()), 1)
    return {name: 1000 * len(pattern.findall(text)) / count for name, pattern in WORDS.items()}


def prose_of(markdown: str) -> str:
    """Return *markdown* without code, comments and addresses; each line keeps its number."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"^( *)(`{3,})(?!\{).*?^\1\2$", blank, markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "x", text)
    return re.sub(r"\]\([^)\s]*\)", "]", text)


def places(name: str, text: str) -> list[tuple[int, str]]:
    """Return the number and text of each line that has a word of *name*."""
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if WORDS[name].search(line)]
