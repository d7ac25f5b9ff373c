"""What is audited: the owner's terms, and the same client where an error of sensitivity or accounting shows better."""

import math
from dataclasses import dataclass, replace

from audit.conformance import amplitude_margin
from audit.trial import AuditError, Size
from client.accounting import Release, rounds_within
from common.config import Privacy

MOST = 4  # trials in an audit
_ROUNDS = 8  # at least, where the budget covers as many steps: noise that repeats has to meet itself
_FEWEST = 100  # canaries

# With every record in each step a record stands this far above the noise: far enough to tell an epsilon from its half.
_SIGNAL, _FULL_ROUNDS, _FULL_CANARIES = 5.0, 24, 1000
_MARGIN = 0.5  # of the amplitude there: a doubled sensitivity lies far outside


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A trial to be made: `rounds` rounds of `steps` steps."""

    name: str
    privacy: Privacy
    size: Size
    rounds: int
    steps: int


def settings(privacy: Privacy, size: Size, *, short: bool, level: float) -> list[Setting]:
    """The owner's terms first. The short form leaves out those that only add points to the picture.

    Raises:
        AuditError: the noise is so large that no record could be seen.
    """
    chosen = [_affordable("the owner's terms", privacy, size), _full(privacy, size, level)]
    if not short:
        for name, factor in (("half the noise", 0.5), ("twice the noise", 2.0)):
            changed = {"noise_multiplier": min(1e6, max(0.01, factor * privacy.noise_multiplier))}
            chosen.append(_affordable(name, privacy.model_copy(update=changed), size))
    return chosen


def fit(size: Size, privacy: Privacy) -> Size:
    """`size` with as many canaries as the client takes: it trains on no 1/delta records.

    Raises:
        AuditError: too few to measure anything.
    """
    most = math.ceil(1 / privacy.delta) - 1
    if most < _FEWEST:
        raise AuditError(
            f"privacy.delta: {privacy.delta:g} allows {most} records, the audit needs {_FEWEST} (lower delta)"
        )
    return replace(size, canaries=min(size.canaries, most))


def _affordable(name: str, privacy: Privacy, size: Size) -> Setting:
    """As many rounds as the budget covers and the audit has time for, and two at least."""
    step = Release(noise_multiplier=float(privacy.noise_multiplier), sample_rate=privacy.sample_rate, steps=1)
    covered = rounds_within(privacy.epsilon, privacy.accounting, frozenset(), step, privacy.delta)
    total = min(size.steps, covered)
    steps = min(privacy.max_steps_per_round, max(1, total // _ROUNDS))
    return Setting(name=name, privacy=privacy, size=size, rounds=max(2, total // steps), steps=steps)


def _full(privacy: Privacy, size: Size, level: float) -> Setting:
    """One step a round on every record, beyond the budget if need be: what a canary adds shows without chance."""
    sigma, canaries = float(privacy.noise_multiplier), min(size.canaries, _FULL_CANARIES)
    rounds = max(_FULL_ROUNDS, min(size.steps, math.ceil((_SIGNAL * sigma) ** 2)))
    margin = amplitude_margin(records=canaries // 2, steps=rounds, rate=1.0, sigma=sigma, level=level)
    if margin > _MARGIN:
        raise AuditError(
            f"privacy.noise_multiplier: {sigma:g} hides {canaries // 2} canaries for {rounds} steps"
            " (the audit has nothing to see under so much noise)"
        )
    terms = privacy.model_copy(update={"batch_size": privacy.records, "max_steps_per_round": 1})
    return Setting(
        name="every record in each step", privacy=terms, size=replace(size, canaries=canaries), rounds=rounds, steps=1
    )
