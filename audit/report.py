"""From trials to a verdict. A check fails only where a sound client would fail it with probability 5e-8 at most."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from audit import conformance
from audit.one_run import claim_p_value, measured_epsilon
from audit.privacy_loss import losses, refuted_epsilon
from audit.settings import MOST, Setting, fit, settings
from audit.trial import Size, Trial, run
from client import accounting
from common import audit as result
from common.audit import Audit, Check, Point
from common.config import Policy

CONFIDENCE = 0.95  # of the lower bound from one run, as in the paper
FALSE_ALARM = 1e-6  # probability that an audit of a sound client fails, at most
SHORT = Size(canaries=2000, silent=500, steps=500)
LONG = Size(canaries=4000, silent=1000, steps=500)
_LEVEL = FALSE_ALARM / (MOST * 5)  # of each of five checks of each trial

# A p-value of the paper's theorem is at least about delta. The claim that is tested is therefore the client's at a
# smaller delta; the ledger's releases give one at each.
_STRICT_DELTA = 1e-12


def audit(policy: Policy, *, short: bool, progress: Callable[[str], None] = lambda _: None) -> Audit:
    """Runs all trials under the terms of `policy`.

    Raises:
        AuditError: there is nothing to audit under these terms.
    """
    started = time.monotonic()
    size = fit(SHORT if short else LONG, policy.privacy)
    found = []
    for setting in settings(policy.privacy, size, short=short, level=_LEVEL):
        progress(f"{setting.name}: {setting.rounds} rounds of {setting.steps} steps")
        trial = run(setting.privacy, policy.training, rounds=setting.rounds, steps=setting.steps, size=setting.size)
        found.append(_measure(setting, trial))
    return Audit(
        time=datetime.now(UTC).replace(microsecond=0),
        ok=all(check.ok for setting in found for check in setting.checks),
        short=short,
        confidence=CONFIDENCE,
        false_alarm=FALSE_ALARM,
        canaries=size.canaries,
        seconds=round(time.monotonic() - started, 1),
        privacy=policy.privacy,
        settings=found,
    )


def _measure(setting: Setting, trial: Trial) -> result.Setting:
    rounds = len(trial.claims)
    points = [_point(trial, part) for part in sorted({-(-rounds * n // 16) for n in (1, 2, 4, 8, 12, 16)})]
    scores = losses(trial.seen, trial.round_)
    account = trial.account
    delta = min(account.delta, _STRICT_DELTA)
    claim = accounting.epsilon(account.mode, account.charged, delta)
    checks = [
        conformance.noise_variance(trial, _LEVEL),
        conformance.canary_amplitude(trial, _LEVEL),
        conformance.noise_correlation(trial, _LEVEL),
        Check.of(name="epsilon by privacy loss", observed=points[-1].privacy_loss, low=0.0, high=points[-1].claimed),
        Check.of(
            name="p-value of the claim",
            observed=claim_p_value(scores, trial.included, epsilon=claim, delta=delta),
            low=_LEVEL,
            high=1.0,
        ),
    ]
    return result.Setting(
        name=setting.name,
        noise_multiplier=trial.round_.noise_multiplier,
        sample_rate=trial.round_.sample_rate,
        steps=trial.round_.steps,
        points=points,
        checks=checks,
    )


def _point(trial: Trial, rounds: int) -> Point:
    """Claim and measurements after the first `rounds` rounds."""
    delta = trial.account.delta
    claimed = trial.claims[rounds - 1]
    if rounds == len(trial.claims):  # what was said and what is written must both be true
        claimed = min(claimed, trial.account.epsilon_spent)
    scores = losses(trial.seen[:rounds], trial.round_)
    return Point(
        rounds=rounds,
        claimed=claimed,
        one_run=measured_epsilon(scores, trial.included, delta=delta, level=1 - CONFIDENCE),
        privacy_loss=refuted_epsilon(scores, trial.included, delta=delta, level=_LEVEL),
    )
