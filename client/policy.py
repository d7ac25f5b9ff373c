"""The owner's terms against what the server asks for: in range, or refused. Nothing is adjusted silently."""

import math
import re
from typing import get_args

from client.accounting import Release
from client.ledger import Account
from common.config import Compression, Policy, Privacy
from common.messages import Proposal, Reason, Standing
from common.statement import RUN_NAME


class Refused(Exception):
    """A typed no. `detail` is one line that holds no data."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def worst_round(privacy: Privacy) -> Release:
    """The largest charge that one round may make under the owner's terms."""
    return _release(privacy, privacy.max_steps_per_round)


def accept(proposal: Proposal, policy: Policy) -> Release:
    """What the proposed round would release.

    Raises:
        Refused: naming the first key that is out of the owner's range.
    """
    privacy, training = policy.privacy, policy.training
    if proposal.task != policy.task:
        raise Refused(Reason.POLICY, f"task: this client serves {policy.task}, asked for {proposal.task[:80]!r}")
    if not 1 <= proposal.steps <= privacy.max_steps_per_round:
        raise Refused(Reason.POLICY, f"steps: expected 1 to {privacy.max_steps_per_round}, asked for {proposal.steps}")
    if not (math.isfinite(proposal.learning_rate) and 0 < proposal.learning_rate <= training.max_learning_rate):
        raise Refused(
            Reason.POLICY,
            f"learning_rate: expected in (0, {training.max_learning_rate}], asked for {proposal.learning_rate}",
        )
    if proposal.run and not re.fullmatch(RUN_NAME, proposal.run):
        raise Refused(Reason.POLICY, "run: expected a name of at most 64 of A-Z a-z 0-9 . _ -")
    if proposal.compression not in get_args(Compression):
        asked = proposal.compression[:80]
        raise Refused(Reason.POLICY, f"compression: expected {', '.join(get_args(Compression))}, asked for {asked!r}")
    return _release(privacy, proposal.steps)


def standing(account: Account, privacy: Privacy) -> Standing:
    """The account as the server is told of it."""
    return Standing(
        partition=account.partition,
        epsilon_spent=account.epsilon_spent,
        epsilon_budget=account.budget,
        delta=account.delta,
        rounds_remaining=account.rounds_remaining(worst_round(privacy)),
        ledger_sequence=account.sequence,
        ledger_head=account.head,
    )


def _release(privacy: Privacy, steps: int) -> Release:
    return Release(
        noise_multiplier=float(privacy.noise_multiplier), sample_rate=float(privacy.sample_rate), steps=steps
    )
