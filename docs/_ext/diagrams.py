"""The directive ``diagram``: a picture drawn from text when the documentation is built.

::

    ```{diagram} way-of-a-record
    A description of the picture, for readers who do not see it.
    ```

``docs/diagrams/NAME.dot`` is drawn by ``dot`` of graphviz, and the SVG stands in the page itself, so that the page's
style sheet colours it, in light and in dark mode. Without ``dot``, the page shows the description.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.util import logging

FOLDER = Path(__file__).parent.parent / "diagrams"


def draw(name: str, description: str) -> str | None:
    """Return the SVG of a diagram for a page of HTML; None without ``dot``.

    :raises subprocess.CalledProcessError: the text of the diagram is wrong.
    """
    if not shutil.which("dot"):
        return None
    source = (FOLDER / f"{name}.dot").read_text()
    done = subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, text=True, check=True)
    svg = done.stdout[done.stdout.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<title>.*?</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:fill|stroke|font-family)="[^"]*"', "", svg)  # the style sheet has them
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    label = html.escape(" ".join(description.split()), quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


class Diagram(Directive):
    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name, description = self.arguments[0], "\n".join(self.content).strip()
        if not description:
            raise self.error("a diagram needs a description")
        self.state.document.settings.env.note_dependency(str(FOLDER / f"{name}.dot"))
        drawn = draw(name, description)
        if drawn is None:
            logging.getLogger(__name__).info("dot of graphviz is not here: %s is a text", name)
            return [nodes.container("", nodes.paragraph("", description), classes=["diagram"])]
        return [
            nodes.raw("", f'<div class="diagram">{drawn}</div>', format="html"),
        ]


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("diagram", Diagram)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
