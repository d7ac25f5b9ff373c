"""The page for a data protection officer: what each partition has signed, and how to check it without the server."""

from collections.abc import Sequence
from html import escape

from common import statement as common
from common.certificates import fingerprint_of
from common.statement import Signed, Statement
from server.report_tables import Html, table

_HOW = """\
<p>Each row was signed by the partition itself, with the key that it proves itself with; the server only passed it on.
The file <code>privacy.json</code> beside this page holds the statements in full. Check signatures, epsilon and, where
you have it, the ledger, offline and without believing this page:</p>
<pre>python -m client.statement verify privacy.json --public-keys DIR --ledger PATH</pre>"""


def section(found: tuple[Sequence[Signed], Sequence[str]] | None) -> str:
    """The statements of a run as HTML, the terms that they share below the table."""
    if found is None:
        return "<p>This run has no file of statements.</p>"
    signed, without = found
    parts = []
    if signed:
        head = ("Partition", "Epsilon", "Mechanism", "Accounting", "This run", "Ledger", "Audit", "Key")
        parts = [
            _HOW,
            table("What each partition has stated and signed", head, [_row(each.statement) for each in signed]),
            _terms([each.statement for each in signed]),
        ]
    if without:
        parts.append(f"<p>Without a statement in this run: {escape(', '.join(without))}.</p>")
    return "\n".join(parts) or "<p>No partition was asked in this run.</p>"


def _row(said: Statement) -> tuple[str, ...]:
    mechanism, run, audit = said.mechanism, said.run, said.audit
    return (
        said.partition,
        f"{said.epsilon_spent:.3f} of {said.epsilon_budget:g} at delta {said.delta:g}",
        f"noise {mechanism.noise_multiplier:g}, rate {mechanism.batch_size}/{mechanism.records_nominal},"
        f" clip {mechanism.max_grad_norm:g}; {_releases(said)}",
        said.accounting.mode,
        f"{run.rounds_charged} rounds charged, {run.rounds_committed} sent" if run else "not named",
        f"line {said.ledger.sequence}, {said.ledger.hash[:12]}…, {said.ledger.time[:19].replace('T', ' ')}",
        f"{'passed' if audit.ok else 'VIOLATION'}, epsilon at least {audit.epsilon_lower_bound:.2f}, {audit.time[:19]}"
        if audit
        else "none",
        _breakable(fingerprint_of(common.public_key(said.public_key))),
    )


def _breakable(text: str) -> Html:
    """A text without spaces that may go on in the next line."""
    return Html("<wbr>".join(escape(text[start : start + 12]) for start in range(0, len(text), 12)))


def _releases(said: Statement) -> str:
    steps = sum(release.steps for release in said.releases)
    if len(said.releases) > 1:
        return f"{steps} steps in {len(said.releases)} mechanisms, over all runs"
    return f"{steps} steps over all runs"


def _terms(said: Sequence[Statement]) -> str:
    """The words of the statements, each once."""
    groups = {
        "Unit": [f"{each.unit}; neighbours: {each.adjacency}" for each in said],
        "Mechanism": [f"{m.name}, {m.sampling} sampling, {m.noise} noise" for m in (each.mechanism for each in said)],
        "Accountant": [f"{each.accounting.mode}: {each.accounting.accountant}" for each in said],
        "Assumed": [text for each in said for text in each.accounting.assumptions],
        "Not covered": [text for each in said for text in each.not_covered],
        "Software": [", ".join(f"{name} {value[:12]}" for name, value in each.software.items()) for each in said],
    }
    rows = []
    for name, texts in groups.items():
        items = "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys(texts))
        rows.append(f"<dt>{name}</dt>\n<dd><ul>{items}</ul></dd>")
    return '<dl class="promise">\n' + "\n".join(rows) + "\n</dl>"
