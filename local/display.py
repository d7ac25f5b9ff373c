"""The words of a run's display, from lines of `rounds.jsonl` and from `summary.json`. Nothing here keeps state."""

import re
import textwrap
from collections.abc import Sequence
from statistics import median
from typing import Any

from common.config import Federation, Policy
from local import steps
from server.report import ranges

Line = dict[str, Any]

_MOST_FULL = 3  # partitions named in full; of more, only what tells them apart
_MOST_NAMED = 60  # beyond that a round's line gives a summary, and the table at the end each partition
_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<index>[0-9]+)-of-(?P<of>[0-9]+)")


def title(federation: Federation, policy: Policy) -> str:
    """What is about to run, and under which terms."""
    names = [partition.name for partition in policy.partitions]
    form = _SPLIT.fullmatch(names[0])
    who = f"{len(names)} clients"
    if len(names) <= _MOST_FULL:
        who = " and ".join(names)
    elif form and _indices(names) is not None:
        who += f" {form['prefix']}-<i>-of-{form['of']}, named below by i"
    privacy = policy.privacy
    return (
        f"{federation.task}: {who}\n{federation.rounds} rounds of {federation.fit_clients} clients,"
        f" budget epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each\n{steps.explain(federation, policy)}"
    )


def round_text(line: Line, rounds: int, width: int) -> str:
    """One completed round: who took part, how good the model is, what each partition has spent."""
    counts = {key: len(line[key]) for key in ("trained", "refused", "failed")}
    who = ", ".join(f"{count} {key}" for key, count in counts.items() if count or key == "trained")
    accuracy = "none" if line["test_accuracy"] is None else f"{line['test_accuracy']:.3f}"
    number = str(line["round"]).rjust(len(str(rounds)))
    start = f"round {number}/{rounds}  "
    epsilon = textwrap.fill(
        f"epsilon {epsilon_text(line['partitions'])}",
        max(width, 40),
        initial_indent=" " * len(start),
        subsequent_indent=" " * (len(start) + len("epsilon ")),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"{start}{who}, accuracy {accuracy}, {line['seconds']:.1f} s\n{epsilon}"


def epsilon_text(partitions: dict[str, Line]) -> str:
    """What each partition has spent of its budget; partitions with the same figures stand together."""
    known = [(row["epsilon_spent"], name, row["epsilon_budget"]) for name, row in partitions.items()]
    known = sorted(figure for figure in known if figure[0] is not None)
    if len(known) > _MOST_NAMED:
        spent = [figure[0] for figure in known]
        of = " to ".join(f"{budget:g}" for budget in sorted({figure[2] for figure in known}))
        between = f"{spent[0]:.3f} to {spent[-1]:.3f} of {of}"
        return f"{between}, median {median(spent):.3f} of {len(spent)} partitions"
    alike: dict[str, list[str]] = {}
    for amount, name, budget in known:
        alike.setdefault(f"{amount:.3f} of {budget:g}", []).append(name)
    short = len(known) > _MOST_FULL
    return "; ".join(f"{what}: {names_text(names, short)}" for what, names in alike.items()) or "unknown"


def names_text(names: Sequence[str], short: bool) -> str:
    """The names, or where `short` and possible their indices."""
    indices = _indices(names) if short else None
    return ", ".join(names) if indices is None else ranges(sorted(indices))


def table(summary: Line) -> str:
    """Where every partition stands, one line each."""
    head = ("partition", "epsilon spent", "budget", "delta", "rounds", "refusals")
    rows = [
        (
            row["partition"],
            *("unknown" if row[key] is None else f"{row[key]:{form}}" for key, form in _FIGURES.items()),
            str(row["rounds_trained"]),
            str(row["refusals"]),
        )
        for row in sorted(summary["partitions"], key=lambda row: _natural(row["partition"]))
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def end(summary: Line, rounds: int) -> str:
    """How far the run came."""
    completed, seconds = summary["rounds_completed"], f"{summary['seconds']:.1f} s"
    if summary["reason"] == "exhausted":
        return f"ended after {completed} of {rounds} rounds, {seconds}: nobody has budget left for another"
    return f"completed {completed} of {rounds} rounds, {seconds}"


def exhausted(summary: Line) -> str:
    """What to do about budgets that are spent; empty if none is."""
    rows = [row for row in summary["partitions"] if row["exhausted"]]
    if not rows:
        return ""
    names = sorted((row["partition"] for row in rows), key=_natural)
    what = "No budget is left for another round"
    if not any(row["epsilon_spent"] for row in rows):
        what = "The budget is too small for one round"
    return (
        f"\n{what}: {names_text(names, len(names) > _MOST_FULL)}.\n"
        "- Rounds that cost less may fit in what is left: a larger NOISE_MULTIPLIER, a smaller BATCH_SIZE.\n"
        "- A larger EPSILON is the owner's decision, and becomes an entry of the ledger.\n"
        "- `make forget` removes the demo's state, budgets included."
    )


_FIGURES = {"epsilon_spent": ".3f", "epsilon_budget": "g", "delta": "g"}


def _indices(names: Sequence[str]) -> list[int] | None:
    """The i of each <prefix>-<i>-of-<n>, if all have that form and share the rest."""
    forms = [form for name in names if (form := _SPLIT.fullmatch(name))]
    if len(forms) != len(names) or len({(form["prefix"], form["of"]) for form in forms}) != 1:
        return None
    return [int(form["index"]) for form in forms]


def _natural(name: str) -> list[str]:
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]
