"""README.md's performance section: made from benchmarks/results/, so that no figure in it is anybody's memory."""

import ast
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_LEFT_OUT = re.compile(r"baseline|(min|max)_\w+|\w+_ratio")  # columns that are for programs
_PLAIN = 6  # columns of a row that has no further ones
_UNITS = {"_s": ", s", "_mb": ", MB"}

Document = dict[str, Any]  # a file of results/


def update(names: Iterable[str], readme: Path = README) -> None:
    """Writes the section into `readme`, between its two marks. Raises ValueError if they are not there once each."""
    before, _, after = split(readme.read_text(encoding="utf-8"))
    readme.write_text(f"{before}{BEGIN}\n{section(names)}{END}{after}", encoding="utf-8")


def split(text: str) -> tuple[str, str, str]:
    """What is before, between and after the marks."""
    if [text.count(BEGIN), text.count(END)] != [1, 1]:
        raise ValueError(f"expected {BEGIN} and {END} once each")
    before, _, rest = text.partition(f"{BEGIN}\n")
    between, _, after = rest.partition(END)
    return before, between, after


def section(names: Iterable[str], results: Path = report.RESULTS) -> str:
    """A table for each benchmark that has a file in `results`, in the order of `names`."""
    parts, before = [], ""
    for name in names:
        if (document := report.read(name, results)) is not None:
            where = _where(document)
            plot = results / f"{name}.svg"
            parts.append(_part(document, where if where != before else "same machine and versions", plot))
            before = where
    return "\n".join(parts)


def _part(document: Document, where: str, plot: Path) -> str:
    name, machine = document["benchmark"], document["machine"]
    busy = "busy" if machine["busy"] else "quiet"
    measures = document["measures"].replace("median_s", "median")
    picture = f" [Plot](benchmarks/results/{plot.name})." if plot.exists() else ""
    about = (
        f"{_purpose(name)} {measures[:1].upper()}{measures[1:]}. {document['date']}, {where}; the machine was {busy}:"
        f" other programs used {machine['cores_used_by_others']} cores.{picture}"
    )
    findings = [_filled(finding, "- ", "  ") for finding in document["findings"]]
    head = [f"### `make bench BENCH={name}`", "", _filled(about), ""]
    return "\n".join([*head, *table(document["rows"]), "", *findings, ""])


def _filled(words: str, first: str = "", later: str = "") -> str:
    return textwrap.fill(
        words, 120, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table: cases by variants where `rows` say no more than ratios, else a line for each."""
    cases, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "variant"))
    found = {(row["case"], row["variant"]): row for row in rows}
    plain = all(row["ratio"] is not None and len(row) == len(rows[0]) == _PLAIN for row in rows)
    if plain and len(rows) == len(found) > len(cases) * len(variants) / 2 and len(variants) > 1:
        lines = []
        for case in cases:
            those = [found.get((case, variant)) for variant in variants]
            runs = min(row["runs"] for row in those if row)
            lines.append([case, *(_both(row) if row else "-" for row in those), str(runs)])
        return _lines(["ratio (median)", *variants, "runs"], lines)
    names = list(dict.fromkeys(name for row in rows for name in row if not _LEFT_OUT.fullmatch(name)))
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    return _lines([_title(name) for name in names], [[_cell(name, row.get(name)) for name in names] for row in rows])


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _both(row: dict[str, Any]) -> str:
    return f"{_short(row['ratio'])} ({seconds(row['median_s'])})"


def _title(name: str) -> str:
    if name == "median_s":
        return "median"
    unit = next((unit for unit in _UNITS if name.endswith(unit)), "")
    return name.removesuffix(unit).replace("_", " ") + _UNITS.get(unit, "")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "median_s":
        return seconds(value)
    return f"{value:,.0f}" if isinstance(value, float) and value >= 1000 else _short(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def seconds(value: float) -> str:
    """Of a median, in a unit that suits it."""
    if value < 1:
        return f"{_short(value * 1e3)} ms"
    return f"{value:.0f} s" if value >= 100 else f"{_short(value)} s"


def _purpose(name: str) -> str:
    """The first line of the benchmark's docstring, without importing what it imports."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _where(document: Document) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in document["versions"].items())
    return f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB, {versions}"
