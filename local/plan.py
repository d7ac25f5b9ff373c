"""What a budget buys, before any of it is spent: the noise that lets some rounds fit, the rounds that some noise buys.

Every figure is the ledger's own account of a new ledger: a noise multiplier that is named here fits its rounds, and
one round more, or a noise 0.001 lower, does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from client.accounting import LEAST_NOISE, MOST_NOISE, Mode, Release, compose, epsilon, noise_within, rounds_within
from common.config import Federation, Policy, Privacy, load, parse
from local import steps
from local.errors import LocalError
from local.parameters import at_most

MODES: tuple[Mode, ...] = get_args(Mode)
PLOT = "plan.svg"  # in the folder of runs
MOST_STEPS = 10**7  # in all: beyond it, an account by loss distributions takes minutes
_SHARES = (0.25, 0.5, 1, 1.5, 2, 3, 4)  # of the rounds that were asked for
_FACTORS = (0.5, 0.75, 1, 1.5, 2)  # on the noise multiplier that was asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What was given; None is not given. The fields are the parameters' names in lower case."""

    epsilon: float | None = None  # budget of a partition
    delta: float | None = None
    rounds: int | None = None  # in which a partition trains
    steps: int | None = None  # of a round
    batch_size: int | None = None  # expected records in a Poisson batch
    records: int | None = None  # nominal records of a partition
    noise_multiplier: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What is planned for: the owner's terms (`max_steps_per_round` is a round's steps) and so many rounds."""

    privacy: Privacy
    rounds: int
    plot: Path

    @property
    def steps(self) -> int:
        return self.privacy.max_steps_per_round

    def release(self, noise_multiplier: float, rounds: int) -> Release:
        """What `rounds` rounds release."""
        rate = float(self.privacy.sample_rate)
        return Release(noise_multiplier=noise_multiplier, sample_rate=rate, steps=rounds * self.steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """The least noise multiplier for so many rounds, and the epsilon that they cost with it."""

    rounds: int
    multiplier: dict[Mode, float]
    epsilon: dict[Mode, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """The rounds that a noise multiplier buys."""

    multiplier: float
    rounds: dict[Mode, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Both directions of the trade-off; one row of each is what was asked for."""

    terms: Terms
    noise: Sequence[Noise]  # by ascending rounds
    rounds: Sequence[Rounds]  # by ascending noise


def terms(wishes: Wishes, folder: Path = Path("config")) -> Terms:
    """The two files of `folder` with the wishes in them.

    Raises:
        LocalError: wishes that do not go together.
        ConfigError: the files are wrong, or the result breaks a rule of theirs.
    """
    federation, policy = load(Federation, folder / "federation.yaml"), load(Policy, folder / "policy.yaml")
    content = policy.model_dump(mode="json")
    privacy = content["privacy"]
    given = {name: getattr(wishes, name) for name in ("epsilon", "delta", "noise_multiplier", "batch_size", "records")}
    privacy.update({name: value for name, value in given.items() if value is not None})
    records, batch_size, rounds = privacy["records"], privacy["batch_size"], wishes.rounds or federation.rounds
    at_most("BATCH_SIZE", batch_size, records, "RECORDS: a batch cannot be expected to hold more than there are")
    if privacy["delta"] * records >= 1:
        raise LocalError(f"DELTA={privacy['delta']:g}: expected below 1 / RECORDS = {1 / records:.3g} (lower it)")
    if not LEAST_NOISE <= privacy["noise_multiplier"] <= MOST_NOISE:
        raise LocalError(
            f"NOISE_MULTIPLIER={privacy['noise_multiplier']:g}: expected {LEAST_NOISE:g} to {MOST_NOISE:g}, as 1.0"
        )
    if wishes.steps is not None:
        at_most("STEPS", wishes.steps, MOST_STEPS, "of a round")
        privacy["max_steps_per_round"] = wishes.steps
    elif (batch_size, records) != (policy.privacy.batch_size, policy.privacy.records):
        privacy["max_steps_per_round"] = steps.epoch(policy.privacy.model_copy(update=given | privacy))
    most = MOST_STEPS // privacy["max_steps_per_round"]
    at_most("ROUNDS", rounds, most, f"{MOST_STEPS:.0e} steps in all, {privacy['max_steps_per_round']} in a round")
    return Terms(
        privacy=parse(Policy, content, source="policy.yaml").privacy,
        rounds=rounds,
        plot=federation.server.runs / PLOT,
    )


def plan(asked: Terms) -> Plan:
    """Searches both directions. Raises LocalError where no noise is enough."""
    rounds = sorted({max(1, round(share * asked.rounds)) for share in _SHARES})
    wanted = float(asked.privacy.noise_multiplier)
    multipliers = sorted({min(MOST_NOISE, max(LEAST_NOISE, factor * wanted)) for factor in _FACTORS})
    return Plan(
        terms=asked,
        noise=[_noise(asked, each) for each in rounds if each * asked.steps <= 4 * MOST_STEPS],
        rounds=[
            Rounds(multiplier=each, rounds={mode: _rounds(asked, each, mode) for mode in MODES}) for each in multipliers
        ],
    )


def _noise(asked: Terms, rounds: int) -> Noise:
    privacy = asked.privacy
    try:
        found = {
            mode: noise_within(
                privacy.epsilon, mode,
                sample_rate=float(privacy.sample_rate), steps=rounds * asked.steps, delta=privacy.delta,
            )
            for mode in MODES
        }  # fmt: skip
    except ValueError as error:
        raise LocalError(f"EPSILON={privacy.epsilon:g}: {error} (raise it, or ask for fewer ROUNDS)") from None
    costs = {mode: epsilon(mode, compose([asked.release(each, rounds)]), privacy.delta) for mode, each in found.items()}
    return Noise(rounds=rounds, multiplier=found, epsilon=costs)


def _rounds(asked: Terms, noise_multiplier: float, mode: Mode) -> int:
    privacy = asked.privacy
    return rounds_within(privacy.epsilon, mode, frozenset(), asked.release(noise_multiplier, 1), privacy.delta)
