"""`report.html` of a run: one file without scripts that opens offline and prints.

The figures of privacy are those that the clients reported, and signed where a section says so. Their ledgers are the
truth, and the page says so.
"""

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from common.files import replace
from server import history, report_statements, statements
from server.report_figures import accuracy, epsilon, known
from server.report_page import PRIVACY, STYLE
from server.report_tables import Html, table

REASONS = {
    "budget_exhausted": "the round's worst case does not fit in what is left of the budget",
    "policy": "the server's proposal was outside the owner's terms",
    "ledger": "the ledger could not be trusted or written",
    "rollback": "the ledger was behind what the server had seen",
    "duplicate": "the message had been charged before",
    "model": "the parameters did not fit the client's model, or the model is not private",
    "data": "the client's data could not be read, or have their budget under another name",
    "memory": "the client's GPU had no room for a step",
}
_ENDS = {
    "completed": "All rounds were done.",
    "exhausted": "The run ended early: no partition had budget left for another round.",
    "failed": "The run ended early. The server's log says why.",
}


def write(run_dir: Path) -> Path:
    """Returns the path of `report.html`, made from `summary.json`, `rounds.jsonl` and `privacy.json` beside it."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    rounds = history.rounds(run_dir)
    page = run_dir / "report.html"
    signed = report_statements.section(statements.read(run_dir))
    replace(page, _page(summary, rounds, signed).encode())
    return page


def _page(summary: dict[str, Any], rounds: list[dict[str, Any]], signed: str) -> str:
    title = f"{summary['task']}, run {summary['run']}"
    body = [
        f"<header><p>Federated training with a privacy budget</p><h1>{escape(title)}</h1>",
        f"<p>{escape(_ENDS.get(summary['reason'], summary['reason']))}</p></header>",
        _facts(summary),
        *_section("accuracy", "Test accuracy", accuracy(rounds)),
        *_section("epsilon", "Epsilon spent", epsilon(rounds)),
        *_section("partitions", "Partitions", _partitions(summary["partitions"])),
        *_section("refusals", "Refused and failed", _refusals(rounds)),
        *_section("statements", "What each partition has signed", signed),
        *_section("privacy", "What is promised, and what is not", PRIVACY),
        *_section("rounds", "Rounds", _round_table(rounds)),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _section(name: str, title: str, content: str) -> list[str]:
    head = f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>'
    return [head, content, "</section>"]


def _facts(summary: dict[str, Any]) -> str:
    reported = [row for row in summary["partitions"] if known(row["epsilon_spent"]) is not None]
    most = max(reported, key=lambda row: row["epsilon_spent"] / row["epsilon_budget"], default=None)
    spent = "unknown"
    if most is not None:
        spent = f"{most['epsilon_spent']:.3f} of {most['epsilon_budget']:g} at delta {most['delta']:g}"
    facts = {
        "Test accuracy": _text(summary["test_accuracy"]),
        "Epsilon, most spent": spent,
        "Partitions": str(len(summary["partitions"])),
        "Rounds": str(summary["rounds_completed"]),
        "Strategy": str(summary["strategy"]),
        "Seconds": _text(summary["seconds"], 1),
    }
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _partitions(rows: list[dict[str, Any]]) -> str:
    head = ("Partition", "Epsilon spent", "Budget", "Delta", "Rounds trained", "Refusals", "Exhausted")
    cells = (
        (
            row["partition"],
            _bar(known(row["epsilon_spent"]), known(row["epsilon_budget"])),
            _text(row["epsilon_budget"], None),
            _text(row["delta"], None),
            str(row["rounds_trained"]),
            str(row["refusals"]),
            "yes" if row["exhausted"] else "no",
        )
        for row in rows
    )
    return table("Where each budget stood after this run, as its client reported it", head, cells)


def _bar(spent: float | None, budget: float | None) -> str:
    if spent is None or not budget:
        return "unknown"
    share = min(100.0, 100 * spent / budget)
    return Html(f'{spent:.3f}<span class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></span>')


def _refusals(rounds: list[dict[str, Any]]) -> str:
    found: dict[tuple[str, str], list[int]] = {}
    for line in rounds:
        for name, reason in line["refused"].items():
            why = f"refused: {reason}; {REASONS.get(reason, 'see the log of the client')}"
            found.setdefault((name, why), []).append(line["round"])
        for name, reason in line["failed"].items():
            found.setdefault((name, f"failed: {reason}"), []).append(line["round"])
    if not found:
        return f"<p>{'Every partition that was asked trained.' if rounds else 'No round was finished.'}</p>"
    rows = ((name, why, ranges(numbers)) for (name, why), numbers in sorted(found.items()))
    return table("Who did not train, why, and in which rounds", ("Partition", "Why", "Rounds"), rows)


def _round_table(rounds: list[dict[str, Any]]) -> str:
    if not rounds:
        return "<p>No round was finished.</p>"
    head = ("Round", "Started (UTC)", "Seconds", "Trained", "Refused", "Failed", "Test accuracy", "Test loss")
    rows = (
        (
            str(line["round"]),
            line["started"][:19].replace("T", " "),
            _text(line["seconds"], 1),
            *(str(len(line[key])) for key in ("trained", "refused", "failed")),
            _text(line["test_accuracy"]),
            _text(line["test_loss"]),
        )
        for line in rounds
    )
    return table("What happened in each round", head, rows)


def ranges(numbers: Iterable[int]) -> str:
    """`1-3, 7`: ascending numbers in few characters."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _text(value: float | None, digits: int | None = 3) -> str:
    if known(value) is None:
        return "unknown"
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"
