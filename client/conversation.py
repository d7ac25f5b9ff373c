"""The host's half of a job: the worker asks, the partition's ledger answers."""

import logging
from collections.abc import Callable
from typing import Any

from client.accounting import Release
from client.dialogue import Ask, Denied
from client.ledger import BudgetExhausted, DataOfAnother, DuplicateMessage, Head, Ledger, LedgerError, RolledBack
from client.policy import standing
from common.config import Privacy
from common.messages import Reason, Standing

log = logging.getLogger(__name__)

_REASONS: tuple[tuple[type[LedgerError], Reason], ...] = (
    (BudgetExhausted, Reason.BUDGET),
    (DuplicateMessage, Reason.DUPLICATE),
    (RolledBack, Reason.ROLLBACK),
    (DataOfAnother, Reason.DATA),
    (LedgerError, Reason.LEDGER),
)


class Conversation:
    """Charges one job to `ledger`; without a ledger every charge is denied."""

    def __init__(self, ledger: Ledger | None, privacy: Privacy) -> None:
        self.ledger = ledger
        self.committed = False
        self.problem: str | None = None  # what is wrong with the ledger, for the owner's eyes
        self._privacy = privacy
        self._reservation: int | None = None

    def answer(self, ask: Ask) -> Any:
        """What `ask` returns to the worker; `Denied` is a no."""
        verbs: dict[str, Callable[..., Any]] = {
            "reserve": self._reserve,
            "commit": self._commit,
            "standing": self._standing,
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

    def _reserve(self, message: str, release: Release, head: Head) -> None:
        ledger = self._usable()
        ledger.require_head(head)
        self._reservation = ledger.reserve(message, release)

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

    def _usable(self) -> Ledger:
        if self.ledger is None:
            raise LedgerError("no ledger")
        return self.ledger
