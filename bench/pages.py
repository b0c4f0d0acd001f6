"""Tables between markers on a page of docs/, and figures that equal data draw alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from rljob.drawing import STYLE

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"


def filled(page: str, topic: str, tables: Mapping[str, str]) -> str:
    """The page with each block between `<!-- TOPIC:NAME -->` and `<!-- end -->` replaced.

    Raises:
        LookupError: the page asks for a table that there is not.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise LookupError(f"the page asks for the table {name!r}; there are {', '.join(tables)}")
        return f"<!-- {topic}:{name} -->\n{tables[name]}\n<!-- end -->"

    return re.sub(rf"<!-- {topic}:(\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def save_figure(draw: Callable[[Figure], None], path: Path, width: float, height: float) -> None:
    """An SVG without a date, so that equal data make equal files."""
    with mpl.rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(width, height))
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white", dpi=110)
