"""The privacy budget of one partition: durable, exclusive, charged before training. Fails closed.

reserve (worst case, fsynced)  ->  train  ->  commit, then reply
                                        \\->  a crash: the reservation stays spent
"""

import json
import os
import threading
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from client.accounting import Release
from client.ledger import chain
from client.ledger.account import VERSION, Account
from client.ledger.chain import ChainError
from client.ledger.siblings import SameData, claim
from common.config import Privacy
from common.files import sync_directory


class LedgerError(Exception):
    """No training: the ledger cannot be trusted, read or written."""


class BudgetExhausted(LedgerError):
    """No training: the charge does not fit in what is left."""


class DuplicateMessage(LedgerError):
    """No training: this message was charged before."""


class RolledBack(LedgerError):
    """No training: the ledger is behind, or beside, a head that was seen outside."""


class DataOfAnother(LedgerError):
    """No release: these records have a budget under another partition's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The end of a ledger as seen from outside: who holds a newer one than the ledger has found a rollback."""

    sequence: int  # 0: none seen
    hash: str


def read(path: Path) -> Account:
    """The account in the file at `path`, verified.

    Raises:
        LedgerError: missing, torn, edited, or not a ledger.
    """
    try:
        return Account(chain.read(path), path)
    except ChainError as error:
        raise LedgerError(str(error)) from None


def create(path: Path, *, partition: str, privacy: Privacy, anchor: Path | None = None) -> None:
    """A ledger with nothing spent: an explicit act of the owner, never a repair.

    Raises:
        LedgerError: `path` or `anchor` exists (this partition was used before), or cannot be written.
    """
    if _read_anchor(anchor):
        raise LedgerError(f"{anchor}: exists already: partition {partition} was used before, find its ledger")
    fixed = privacy.accounting == "fixed"
    body = {
        "version": VERSION,
        "ledger": uuid.uuid4().hex,
        "partition": partition,
        "accounting": privacy.accounting,
        "epsilon": float(privacy.epsilon),
        "delta": float(privacy.delta),
        "mechanism": [float(privacy.noise_multiplier), privacy.sample_rate] if fixed else None,
    }
    try:
        chain.create(path, "create", body)
    except ChainError as error:
        raise LedgerError(str(error)) from None


class Ledger:
    """The one writer of a partition's ledger, from `open` to `close`. Safe to call from several threads."""

    def __init__(self, file: chain.Chain, *, anchor: Path | None) -> None:
        self._file = file
        self._anchor = anchor
        self._lock = threading.Lock()
        self._broken: str | None = None
        self.account = Account(file.entries, file.path)

    @classmethod
    def open(cls, path: Path, *, partition: str, privacy: Privacy, anchor: Path | None = None) -> Self:
        """Locks and verifies the ledger, raises its epoch, and records a changed epsilon as the owner's act.

        Raises:
            LedgerError: missing, held by another client, not to be trusted, or of other terms than `privacy`.
        """
        try:
            file = chain.Chain.open(path)
        except ChainError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise LedgerError(str(error)) from None
            raise LedgerError(
                f"{path}: missing. If partition {partition} was never used: python -m client.ledger create."
                " If it was: find its ledger, what it spent is not known"
            ) from None
        try:
            ledger = cls(file, anchor=anchor)
            ledger._require(partition, privacy)
            if seen := _read_anchor(anchor):
                ledger.require_head(seen)
            ledger._append("open", {"epoch": ledger.account.epoch + 1})
            if ledger.account.budget != privacy.epsilon:
                ledger._append("budget", {"epsilon": float(privacy.epsilon)})
            return ledger
        except (ChainError, LedgerError) as error:
            file.close()
            raise error if isinstance(error, LedgerError) else LedgerError(str(error)) from None

    def close(self) -> None:
        with self._lock:
            self._broken = "closed"
            self._file.close()

    def reserve(self, message: str, release: Release, *, run: str = "") -> int:
        """Charges `release` to the budget; returns the reservation. It is on the disk when this returns.

        `run` is what the server calls the run; it says for whom the budget was spent and decides nothing.

        Raises:
            BudgetExhausted, DuplicateMessage, LedgerError: nothing was charged, nothing may be trained.
        """
        with self._lock:
            self._check()
            account = self.account
            if message in account.messages:
                raise DuplicateMessage(f"message {message} was charged before")
            try:
                account.require_mechanism(release)
            except ValueError as error:
                raise LedgerError(str(error)) from None
            after = account.epsilon_with(release)
            if not after <= account.budget:  # a NaN does not fit either
                raise BudgetExhausted(
                    f"{release.steps} steps would bring epsilon from {account.epsilon_spent:.4g} to {after:.4g},"
                    f" the budget is {account.budget:.4g} at delta {account.delta:g}"
                )
            body = {"message": message, **({"run": run} if run else {}), **asdict(release)}
            return self._append("reserve", body).sequence

    def commit(self, reservation: int, *, data: str | None = None) -> None:
        """Records that the reservation's training was done in full, on `data`. Only after this may its update leave.

        The fingerprint stands in every commit, so that the number of lines does not tell when the data changed.

        Raises:
            DataOfAnother, LedgerError: the update must not leave.
        """
        with self._lock:
            self._check()
            if reservation not in self.account.open:
                raise LedgerError(f"{self._file.path}: no open reservation {reservation}")
            if data is None:
                self._append("commit", {"reservation": reservation})
            elif data in self.account.data:  # then no other ledger can have it
                self._append("commit", {"reservation": reservation, "data": data})
            else:
                self._commit_new(reservation, data)

    def check(self) -> None:
        """Raises LedgerError unless this is still the ledger's only writer and all it wrote is there."""
        with self._lock:
            self._check()

    def require_head(self, head: Head) -> None:
        """Raises RolledBack unless `head` lies on this ledger's chain."""
        account = self.account
        if head.sequence > account.sequence:
            raise RolledBack(
                f"{self._file.path}: ends at {account.sequence}, was seen at {head.sequence}: an old copy was put back"
            )
        if head.sequence < 0 or (head.sequence and account.hashes[head.sequence - 1] != head.hash):
            raise RolledBack(f"{self._file.path}: line {head.sequence} is not the one seen before")

    def _require(self, partition: str, privacy: Privacy) -> None:
        account = self.account
        terms = {
            "partition": (account.partition, partition),
            "delta": (account.delta, float(privacy.delta)),
            "accounting": (account.mode, privacy.accounting),
        }
        if account.mechanism:
            terms["noise_multiplier"] = (account.mechanism[0], float(privacy.noise_multiplier))
            terms["sample_rate (batch_size / records)"] = (account.mechanism[1], privacy.sample_rate)
        for name, (here, wanted) in terms.items():
            if here != wanted:
                raise LedgerError(
                    f"{self._file.path}: {name} is {here}, the policy says {wanted}: fixed for this ledger's life"
                )

    def _commit_new(self, reservation: int, data: str) -> None:
        try:
            with claim(self._file.path, data):
                self._append("commit", {"reservation": reservation, "data": data})
        except SameData as error:
            raise DataOfAnother(str(error)) from None
        except OSError as error:
            raise LedgerError(f"{self._file.path}: what the others have cannot be read: {error}") from None

    def _check(self) -> None:
        if self._broken:
            raise LedgerError(self._broken)
        try:
            self._file.check()
        except ChainError as error:
            raise self._break(error) from None

    def _append(self, kind: str, body: dict[str, Any]) -> chain.Entry:
        try:
            entry = self._file.append(kind, body)
            self.account.apply(entry)
            if self._anchor is not None:
                _write_anchor(self._anchor, Head(sequence=entry.sequence, hash=entry.hash))
        except (ChainError, OSError) as error:
            raise self._break(error) from None
        return entry

    def _break(self, error: Exception) -> LedgerError:
        """After a failed write nobody knows what is on the disk: refuse until a new start has read it."""
        self._broken = str(error)
        return LedgerError(self._broken)


def _read_anchor(path: Path | None) -> Head | None:
    if path is None:
        return None
    try:
        head = Head(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise LedgerError(f"{path}: not a ledger's anchor: {error}") from None
    if type(head.sequence) is not int or type(head.hash) is not str:
        raise LedgerError(f"{path}: not a ledger's anchor: {head}")
    return head


def _write_anchor(path: Path, head: Head) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(asdict(head), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)
