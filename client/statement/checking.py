"""Does a signed statement hold? Signature, arithmetic and ledger, offline, believing nothing that can be computed.

Each check raises `StatementError` with one line that names what does not hold.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from client import accounting
from client.accounting import Composition, Release
from client.ledger import Account, LedgerError, chain
from client.statement.making import merged
from common import statement as common
from common.statement import Signed, Statement, StatementError

TOLERANCE = 1e-6  # relative: what the order of a sum may change from machine to machine


def document(text: str) -> tuple[dict[str, Any], list[Any]]:
    """A statement file: what stands around the statements, which nobody signed, and they themselves, not yet parsed.

    Raises:
        StatementError: not such a file.
    """
    content = common.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("statements"), list):
        raise StatementError("expected an object with a list of statements")
    if not content["statements"]:
        raise StatementError("it holds no statement")
    return {name: value for name, value in content.items() if name != "statements"}, content["statements"]


def check_signature(signed: Signed, keys: Path | None) -> None:
    """Against `<keys>/<partition>.pub`; without `keys` against the key in the statement itself, which proves less."""
    if keys is None:
        signed.verify(common.public_key(signed.statement.public_key))
        return
    path = keys / f"{signed.statement.partition}.pub"
    try:
        line = path.read_bytes()
    except OSError as error:
        raise StatementError(f"{path}: {error.strerror} (no key to compare the signature with)") from None
    signed.verify(common.public_key(line))


def check_arithmetic(statement: Statement, *, budget_kept: bool = False) -> None:
    """Computes everything again that follows from the releases. `budget_kept`: the ledger has shown that already."""
    mechanism, ledger, run = statement.mechanism, statement.ledger, statement.run
    composition = _composition(statement)
    if statement.accounting.mode == "fixed" and len(composition) > 1:
        raise StatementError(f"releases: {len(composition)} mechanisms in fixed mode, which is valid for one")
    if statement.accounting.mode == "fixed" and composition:
        ((used, _),) = composition
        if used != (mechanism.noise_multiplier, mechanism.sample_rate):
            raise StatementError("mechanism: not the one of the releases, in fixed mode")
    epsilon = accounting.epsilon(statement.accounting.mode, composition, statement.delta)
    if abs(epsilon - statement.epsilon_spent) > TOLERANCE * epsilon:
        raise StatementError(
            f"epsilon_spent: states {statement.epsilon_spent:.6g}, its releases cost {epsilon:.6g} by dp-accounting"
            f" {version('dp-accounting')} (the statement's: {statement.software.get('dp-accounting', 'unknown')})"
        )
    if epsilon > statement.epsilon_budget * (1 + TOLERANCE) and not budget_kept:
        raise StatementError(
            f"epsilon_budget: {epsilon:.6g} spent of {statement.epsilon_budget:g}"
            " (where its owner lowered it later, --ledger shows so)"
        )
    if mechanism.sample_rate != mechanism.batch_size / mechanism.records_nominal:
        raise StatementError("mechanism: sample_rate is not batch_size / records_nominal")
    if statement.delta * mechanism.records_nominal >= 1:
        raise StatementError(f"delta: {statement.delta:g} is not below 1 / records_nominal")
    steps = sum(release.steps for release in statement.releases)
    if not ledger.commits <= ledger.charges <= min(steps, ledger.sequence):
        raise StatementError("ledger: its charges, commits and steps do not fit together")
    if run and not (
        run.rounds_committed <= run.rounds_charged <= ledger.charges
        and run.rounds_committed <= ledger.commits
        and run.rounds_charged <= run.steps_charged <= steps
    ):
        raise StatementError("run: more charged than in the whole ledger")
    if statement.audit and not statement.audit.ok:
        raise StatementError(f"audit: the client's audit of {statement.audit.time} found a violation")


def check_ledger(statement: Statement, path: Path) -> None:
    """The statement against the ledger in `path`, as that was at the statement's head."""
    try:
        entries = chain.read(path)
        account = Account(entries[: statement.ledger.sequence], path)
        Account(entries, path)
        _require_budget_kept(entries, path)
    except (chain.ChainError, LedgerError) as error:
        raise StatementError(f"ledger: {error}") from None
    if account.ledger != statement.ledger.id or account.partition != statement.partition:
        raise StatementError(f"ledger: {path} is {account.ledger} of {account.partition}, another one")
    if len(entries) < statement.ledger.sequence:
        raise StatementError(
            f"ledger: {path} ends at line {len(entries)}, the statement knows line {statement.ledger.sequence}:"
            " an old copy was put back"
        )
    if account.head != statement.ledger.hash:
        raise StatementError(f"ledger: line {statement.ledger.sequence} of {path} is not the one that was stated")
    tally = account.run(statement.run.name) if statement.run else None
    there = {
        "ledger.time": (account.last_time, statement.ledger.time),
        "ledger.charges": (len(account.messages), statement.ledger.charges),
        "ledger.commits": (account.commits, statement.ledger.commits),
        "epsilon_budget": (account.budget, statement.epsilon_budget),
        "delta": (account.delta, statement.delta),
        "accounting.mode": (account.mode, statement.accounting.mode),
        "releases": (merged(account.charged), statement.releases),
    }
    if tally and statement.run:
        run = statement.run
        there["run"] = (
            (tally.charges, tally.commits, tally.steps),
            (run.rounds_charged, run.rounds_committed, run.steps_charged),
        )
    for name, (found, stated) in there.items():
        if found != stated:
            raise StatementError(f"{name}: states {stated}, the ledger says {found}")


def _require_budget_kept(entries: list[chain.Entry], path: Path) -> None:
    """Raises StatementError if a charge was made beyond the budget of its time.

    Epsilon grows with every charge, so that the last one before each change of the budget speaks for all before it.
    """
    account, charged = Account([], path), False
    for entry in [*entries, None]:
        if charged and (entry is None or entry.kind == "budget"):
            charged = False
            if account.epsilon_spent > account.budget * (1 + TOLERANCE):
                raise StatementError(
                    f"ledger: {path}: epsilon {account.epsilon_spent:.6g} was charged to a budget of {account.budget:g}"
                )
        if entry is not None:
            account.apply(entry)
            charged = charged or entry.kind == "reserve"


def _composition(statement: Statement) -> Composition:
    try:
        releases = [Release(**release.model_dump()) for release in statement.releases]
    except ValueError as error:
        raise StatementError(f"releases: {error}") from None
    composition = accounting.compose(releases)
    if merged(composition) != statement.releases:
        raise StatementError("releases: expected each mechanism once, in ascending order")
    return composition
