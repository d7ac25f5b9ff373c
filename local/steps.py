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
    """The steps of a round, and why there are fewer than an epoch's."""
    privacy, steps, full = policy.privacy, federation.steps_per_round, epoch(policy.privacy)
    said = f"{steps} local {'step' if steps == 1 else 'steps'} a round"
    if steps >= full:
        return said
    rounds = rounds_each(federation, len(policy.partitions))
    cost = epsilon("adaptive", compose([_release(privacy, full * rounds)]), privacy.delta)
    times = "one round" if rounds == 1 else f"{rounds} rounds"
    return f"{said}: an epoch of {full} would cost epsilon {cost:.3g} in {times}"


def _release(privacy: Privacy, steps: int) -> Release:
    return Release(noise_multiplier=float(privacy.noise_multiplier), sample_rate=privacy.sample_rate, steps=steps)
