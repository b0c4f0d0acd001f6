"""Markdown tables, and where they stand on a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a row under its head for each of the rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with each block between `<!-- staleness:NAME -->` and `<!-- end -->` replaced.

    Raises:
        LookupError: the page asks for a table that there is not.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise LookupError(f"docs/results.md asks for the table {name!r}; there are {', '.join(tables)}")
        return f"<!-- staleness:{name} -->\n{tables[name]}\n<!-- end -->"

    return re.sub(r"<!-- staleness:(\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)
