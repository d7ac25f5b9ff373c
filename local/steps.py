"""How many local steps a round takes, which is none of the parameters: an expected epoch, or what the budget covers."""

import math

from client.accounting import Release, compose, epsilon, rounds_within
from common.config import Federation, Policy, Privacy


def epoch(privacy: Privacy) -> int:
    """Steps in which each record is expected to be drawn once."""
    return math.ceil(privacy.records / privacy.batch_size)


def affordable(privacy: Privacy, rounds_each: int) -> int:
    """The steps, an epoch's at most and 1 at least, with which `rounds_each` rounds fit in a new ledger."""
    steps = rounds_within(privacy.epsilon, "adaptive", frozenset(), _release(privacy, 1), privacy.delta)
    return max(1, min(epoch(privacy), steps // rounds_each))


def rounds_each(federation: Federation, clients: int) -> int:
    """How often a partition is expected to be sampled."""
    return math.ceil(federation.rounds * federation.fit_clients / clients)


def explain(federation: Federation, policy: Policy) -> str:
    """The steps of a round, why there are fewer than an epoch's, and how long the budget lasts if that is too short."""
    privacy, steps, full = policy.privacy, federation.steps_per_round, epoch(policy.privacy)
    said = f"{steps} local {'step' if steps == 1 else 'steps'} a round"
    if steps >= full:
        return said
    rounds = rounds_each(federation, len(policy.partitions))
    for share, times in ((1, "at once"), (rounds, f"in {rounds} rounds")):
        cost = epsilon("adaptive", compose([_release(privacy, full * share)]), privacy.delta)
        if cost > privacy.epsilon:
            said += f": an epoch of {full} would cost epsilon {cost:.2f} of {privacy.epsilon:g} {times}"
            break
    lasts = rounds_within(privacy.epsilon, "adaptive", frozenset(), _release(privacy, steps), privacy.delta)
    return said if lasts >= rounds else f"{said}\nthe budget lasts for {lasts} of about {rounds} rounds of each client"


def _release(privacy: Privacy, steps: int) -> Release:
    return Release(noise_multiplier=float(privacy.noise_multiplier), sample_rate=privacy.sample_rate, steps=steps)
