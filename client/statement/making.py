"""A partition's statement, made from its ledger and its owner's policy and signed with its key.

Every figure is read from the verified ledger or is a constant of the policy: nothing depends on the data.
"""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from client.accounting import DISCRETIZATION, ORDERS, Composition, Mode
from client.ledger import Account
from client.ledger.account import Tally
from common import audit, statement
from common.certificates import PkiError, load_key
from common.config import Policy
from common.statement import (
    Accounting,
    Audit,
    LedgerHead,
    Mechanism,
    Run,
    Signed,
    Statement,
    StatementError,
    Steps,
)

_ROOT = Path(__file__).parent.parent.parent
_PACKAGES = ("fedeps", "dp-accounting", "opacus", "torch", "flwr", "cryptography", "numpy")
_ACCOUNTANTS: dict[Mode, str] = {
    "adaptive": f"Renyi DP at {len(ORDERS)} fixed orders from {ORDERS[0]:g} to {ORDERS[-1]:g}, by dp-accounting",
    "fixed": f"privacy loss distribution (PLD), pessimistic at discretization {DISCRETIZATION:g} or finer,"
    " by dp-accounting",
}
_ASSUMPTIONS: dict[Mode, str] = {
    "adaptive": "The terms of a round may depend on earlier rounds: Renyi DP at fixed orders is a valid filter"
    " (Feldman & Zrnic 2021, arXiv:2008.11193; Lecuyer 2021, arXiv:2103.01379).",
    "fixed": "Every release of this ledger uses one noise multiplier and one sample rate; only the number of steps"
    " is chosen on the way, and the budget caps it (Koskela et al. 2020, arXiv:1906.03049).",
}
_ALWAYS_ASSUMED = (
    "Each record joins each batch independently with the sample rate, a constant of the policy.",
    "Each record's gradient is clipped to max_grad_norm in the L2 norm, and no record changes another's gradient.",
    "Noise and sampling come from AES-256 in counter mode under a key that the operating system draws for each job.",
    "The guarantee under any way of stopping is the budget; what is spent is what was composed so far.",
)
_NOT_COVERED = (
    "That the partition takes part, in which rounds, and how often it refused.",
    "Several records of one person, in one partition or in several: each counts for itself.",
    "Use of the same records outside this ledger.",
    "An exact proof for floating-point noise: it is rounded to a public grid (Mironov 2012, see docs/privacy.md).",
    "Timing, power and other side channels, and whoever can read the client's machine.",
    "An owner or administrator who replaces the ledger, its anchors and the key together.",
)


class Signer:
    """Makes the statements of one partition. Raises StatementError where one cannot be made."""

    def __init__(self, policy: Policy, partition: str) -> None:
        self._policy, self._partition = policy, partition
        software()  # of the code as it was started, not as an update left it

    def sign(self, account: Account, *, run: str = "", update: str | None = None) -> Signed:
        """`account` in words, for `run` if it is named, with the digest of the update that it goes with."""
        path = self._policy.key_path(self._partition)
        try:
            key = load_key(path)
        except OSError as error:
            raise StatementError(f"{path}: {error.strerror} (it is the partition's key)") from None
        except PkiError as error:
            raise StatementError(str(error)) from None
        public = statement.public_text(key.public_key())
        try:
            signed = Signed.by(key, state(account, self._policy, run=run, update=update, public_key=public))
        except ValueError as error:
            raise StatementError(f"{account.partition}: {' '.join(str(error).split())}") from None
        if len(signed.dumps()) > statement.MAX_BYTES:
            raise StatementError(f"{account.partition}: a statement of more than {statement.MAX_BYTES} characters")
        return signed


def state(account: Account, policy: Policy, *, run: str, update: str | None, public_key: str) -> Statement:
    """The statement that follows from `account` and `policy`."""
    privacy = policy.privacy
    return Statement(
        version=1,
        partition=account.partition,
        task=policy.task,
        run=_run(run, account.run(run)) if run else None,
        unit="one record of the partition",
        adjacency="add-or-remove-one",
        epsilon_spent=account.epsilon_spent,
        epsilon_budget=account.budget,
        delta=account.delta,
        mechanism=Mechanism(
            name="DP-SGD",
            sampling="Poisson",
            noise="Gaussian",
            noise_multiplier=float(privacy.noise_multiplier),
            max_grad_norm=float(privacy.max_grad_norm),
            batch_size=privacy.batch_size,
            records_nominal=privacy.records,
            sample_rate=float(privacy.sample_rate),
            max_steps_per_round=privacy.max_steps_per_round,
        ),
        accounting=Accounting(
            mode=account.mode,
            accountant=_ACCOUNTANTS[account.mode],
            assumptions=(*_ALWAYS_ASSUMED, _ASSUMPTIONS[account.mode]),
        ),
        releases=merged(account.charged),
        ledger=LedgerHead(
            id=account.ledger,
            sequence=account.sequence,
            hash=account.head,
            time=account.last_time,
            charges=len(account.messages),
            commits=account.commits,
        ),
        update_sha256=update,
        audit=_audit(policy),
        software=software(),
        not_covered=_NOT_COVERED,
        public_key=public_key,
    )


def _run(name: str, tally: Tally) -> Run:
    return Run(name=name, rounds_charged=tally.charges, rounds_committed=tally.commits, steps_charged=tally.steps)


def merged(composition: Composition) -> tuple[Steps, ...]:
    """All steps per mechanism, in a fixed order: grouping costs nothing in either mode."""
    return tuple(
        Steps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        for (noise_multiplier, sample_rate), steps in sorted(composition)
    )


def _audit(policy: Policy) -> Audit | None:
    """The result of the last audit on this machine. None where there is none of these terms that can be read."""
    try:
        found = audit.read(policy.client.audit)
    except audit.AuditUnreadable:
        return None
    if found is None or found.privacy != policy.privacy:
        return None  # an audit of other terms vouches for none of these
    return Audit(ok=found.ok, epsilon_lower_bound=found.epsilon_lower_bound, time=found.time.isoformat())


@cache
def software() -> dict[str, str]:
    """The versions that a claim rests on, and a digest of this client's own code."""
    found = {"python": platform.python_version(), "source_sha256": _source()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # fedeps itself, where it runs from a checkout
            found[name] = "0+checkout"
    return found


def _source() -> str:
    """SHA-256 over the names and contents of all modules in client/ and common/, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(file for package in ("client", "common") for file in (_ROOT / package).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()
