"""Tables of a run's report: every cell is escaped where it enters the page, unless it is markup of ours."""

from collections.abc import Iterable, Sequence
from html import escape

Rows = Iterable[Sequence[str]]


class Html(str):
    """Text that is markup already."""


def table(caption: str, head: Sequence[str], rows: Rows) -> str:
    """A table whose first column names its rows."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{cell if isinstance(cell, Html) else escape(cell)}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{chr(10).join(body)}\n</tbody></table>"
    )
