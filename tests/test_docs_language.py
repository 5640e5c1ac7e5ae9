"""The prose of the documentation is plain: few of the words that make a reader look for the subject."""

from __future__ import annotations

import pytest
from language import LIMITS, places, prose_of, rates
from test_docs import PAGES, ROOT

TEXTS = {
    path.relative_to(ROOT): prose_of(path.read_text())
    for path in [*PAGES, *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))]
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_prose_is_plain(name: str) -> None:
    rate = rates(" ".join(TEXTS.values()))[name]
    found = [f"{path}:{number}: {line}" for path, text in TEXTS.items() for number, line in places(name, text)]
    assert rate <= LIMITS[name], "\n".join([f"{name}: {rate:.1f} per 1,000 words", *found])


def test_code_links_and_comments_do_not_count() -> None:
    page = "One `what` [two](what.md) three\n<!-- what: a mark -->\n```sh\nwhat\n```\nfour what five\n"
    text = prose_of(page)
    assert text.split() == ["One", "x", "[two]", "three", "four", "what", "five"]
    assert rates(text)["what"] == pytest.approx(1000 / 7)
    assert places("what", text) == [(6, "four what five")]
    assert rates("")["what"] == 0


def test_each_word_is_found_in_any_case() -> None:
    text = "What whoever TOLD nobody, whatever"
    assert rates(text) == {"what": 200, "who": 200, "tell": 200, "body": 200}
