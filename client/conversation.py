"""The host's half of a job: the worker asks, the partition's ledger answers."""

import logging
from collections.abc import Callable
from typing import Any

from client.accounting import Release
from client.dialogue import Ask, Denied
from client.ledger import BudgetExhausted, DataOfAnother, DuplicateMessage, Head, Ledger, LedgerError, RolledBack
from client.policy import standing
from client.statement.making import Signer
from common.config import Privacy
from common.messages import Reason, Standing
from common.statement import StatementError

log = logging.getLogger(__name__)

_REASONS: tuple[tuple[type[LedgerError], Reason], ...] = (
    (BudgetExhausted, Reason.BUDGET),
    (DuplicateMessage, Reason.DUPLICATE),
    (RolledBack, Reason.ROLLBACK),
    (DataOfAnother, Reason.DATA),
    (LedgerError, Reason.LEDGER),
)


class Conversation:
    """Charges one job to `ledger`; without a ledger every charge is denied, without a signer nothing is stated."""

    def __init__(self, ledger: Ledger | None, privacy: Privacy, signer: Signer | None = None) -> None:
        self.ledger = ledger
        self.committed = False
        self.problem: str | None = None  # what is wrong with the ledger, for the owner's eyes
        self._privacy = privacy
        self._signer = signer
        self._reservation: int | None = None

    def answer(self, ask: Ask) -> Any:
        """What `ask` returns to the worker; `Denied` is a no."""
        verbs: dict[str, Callable[..., Any]] = {
            "reserve": self._reserve,
            "commit": self._commit,
            "standing": self._standing,
            "statement": self._statement,
        }
        try:
            return verbs[ask.verb](*ask.arguments)
        except LedgerError as error:
            reason = next(reason for kind, reason in _REASONS if isinstance(error, kind))
            if reason in (Reason.BUDGET, Reason.DUPLICATE):
                return Denied(reason=reason, detail=str(error))
            log.error("%s", error)
            if reason is Reason.DATA:
                return Denied(reason=reason, detail="the data of this partition cannot be used")
            self.problem = str(error)
            return Denied(reason=reason, detail="the ledger of this partition cannot be used")

    def _reserve(self, message: str, release: Release, head: Head, run: str = "") -> None:
        ledger = self._usable()
        ledger.require_head(head)
        self._reservation = ledger.reserve(message, release, run=run)

    def _commit(self, data: str) -> Standing:
        ledger = self._usable()
        if self._reservation is None:
            raise LedgerError("a commit without a reservation")
        ledger.commit(self._reservation, data=data)
        self.committed = True
        return standing(ledger.account, self._privacy)

    def _standing(self) -> Standing | None:
        try:
            ledger = self._usable()
            ledger.check()
            return standing(ledger.account, self._privacy)
        except LedgerError:
            return None

    def _statement(self, run: str, update: str | None) -> str | None:
        """The signed statement of what `standing` tells. None where there is none: the round does not depend on it."""
        if self._signer is None:
            return None
        try:
            ledger = self._usable()
            ledger.check()
            return self._signer.sign(ledger.account, run=run, update=update).dumps()
        except (LedgerError, StatementError) as error:
            log.warning("no signed statement goes with the reply: %s", error)
            return None

    def _usable(self) -> Ledger:
        if self.ledger is None:
            raise LedgerError("no ledger")
        return self.ledger
