"""What a ledger's entries add up to. A pure replay: the same entries, the same account, for writer and reader alike."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from client import accounting
from client.accounting import Composition, Mechanism, Release
from client.ledger import chain

VERSION = 1


@dataclass(kw_only=True, slots=True)
class Tally:
    """What was charged for one run, under the name that the server gave it."""

    charges: int = 0
    commits: int = 0
    steps: int = 0


class Account:
    """One partition's budget after some entries.

    Every reservation counts as spent from the moment it is written: a crash can only over-count, and epsilon never
    falls. `epsilon_reserved` is the part of it that has no commit (yet).
    """

    def __init__(self, entries: Iterable[chain.Entry], source: Path) -> None:
        """Replays `entries`.

        Raises:
            chain.ChainError: an entry that no client of ours would have written.
        """
        self._source = source
        self.hashes: list[str] = []
        self.epoch = 0
        self.messages: set[str] = set()
        self.open: dict[int, Release] = {}  # reservations without a commit, by sequence
        self.commits = 0
        self.data: set[str] = set()  # fingerprints of what was trained on; none in ledgers from before they were kept
        self.last_time = ""
        self._runs: dict[str, Tally] = {}
        self._run_of: dict[int, str] = {}  # of the open reservations
        self._charged: dict[Mechanism, int] = {}
        self._committed: dict[Mechanism, int] = {}
        for entry in entries:
            self.apply(entry)

    def apply(self, entry: chain.Entry) -> None:
        try:
            datetime.fromisoformat(entry.time)  # what follows from the time is only shown, but it must be one
            if (entry.kind == "create") != (not self.hashes):
                raise ValueError("an account is created once, first")
            getattr(self, f"_apply_{entry.kind}")(entry, **entry.body)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise chain.ChainError(f"{self._source}: line {entry.sequence}: not valid here: {error}") from None
        self.hashes.append(entry.hash)
        self.last_time = entry.time

    def _apply_create(
        self, _: chain.Entry, *, version: int, ledger: str, partition: str, accounting: accounting.Mode,
        epsilon: float, delta: float, mechanism: list[float] | None,
    ) -> None:  # fmt: skip
        if version != VERSION:
            raise ValueError(f"version {version}, this client knows {VERSION}")
        if accounting not in ("fixed", "adaptive") or (mechanism is None) == (accounting == "fixed"):
            raise ValueError("accounting and mechanism do not fit")
        if type(ledger) is not str or type(partition) is not str:
            raise ValueError("expected the names of ledger and partition")
        self.ledger, self.partition, self.mode = ledger, partition, accounting
        self.delta = _positive(delta)
        self.budget = _positive(epsilon)
        self.mechanism = tuple(mechanism) if mechanism else None

    def _apply_open(self, _: chain.Entry, *, epoch: int) -> None:
        if epoch != self.epoch + 1:
            raise ValueError(f"epoch {epoch} after {self.epoch}")
        self.epoch = epoch

    def _apply_budget(self, _: chain.Entry, *, epsilon: float) -> None:
        self.budget = _positive(epsilon)

    def _apply_reserve(self, entry: chain.Entry, *, message: str, run: str = "", **release: Any) -> None:
        if message in self.messages:
            raise ValueError(f"message {message} is charged already")
        if type(run) is not str:
            raise ValueError("expected the name of a run")
        charge = Release(**release)
        self.require_mechanism(charge)
        self.messages.add(message)
        self.open[entry.sequence] = charge
        self._run_of[entry.sequence] = run
        tally = self._runs.setdefault(run, Tally())
        tally.charges += 1
        tally.steps += charge.steps
        _add(self._charged, charge)

    def _apply_commit(self, _: chain.Entry, *, reservation: int, data: str | None = None) -> None:
        if data is not None:
            if type(data) is not str:
                raise ValueError("expected the data's fingerprint as a text")
            self.data.add(data)
        _add(self._committed, self.open.pop(reservation))
        self._runs[self._run_of.pop(reservation)].commits += 1
        self.commits += 1

    def require_mechanism(self, release: Release) -> None:
        """Raises ValueError if a `fixed` ledger was created for another mechanism."""
        if self.mechanism not in (None, (release.noise_multiplier, release.sample_rate)):
            raise ValueError(f"{release} in a fixed ledger of noise_multiplier, sample_rate = {self.mechanism}")

    @property
    def sequence(self) -> int:
        return len(self.hashes)

    @property
    def head(self) -> str:
        return self.hashes[-1]

    def run(self, name: str) -> Tally:
        """What was charged for the run of this name; nothing for one that the ledger does not know."""
        return self._runs.get(name, Tally())

    @property
    def charged(self) -> Composition:
        """All steps that were reserved, committed or not."""
        return frozenset(self._charged.items())

    @property
    def epsilon_spent(self) -> float:
        """Epsilon at `delta` of all reservations, committed or not."""
        return accounting.epsilon(self.mode, self.charged, self.delta)

    @property
    def epsilon_reserved(self) -> float:
        """The part of `epsilon_spent` whose training did not (yet) end in a commit."""
        return self.epsilon_spent - accounting.epsilon(self.mode, frozenset(self._committed.items()), self.delta)

    def epsilon_with(self, release: Release) -> float:
        """What `epsilon_spent` would be after `release`."""
        more = dict(self._charged)
        _add(more, release)
        return accounting.epsilon(self.mode, frozenset(more.items()), self.delta)

    def rounds_remaining(self, round_: Release) -> int:
        """How many rounds like `round_` the budget still covers."""
        return accounting.rounds_within(self.budget, self.mode, self.charged, round_, self.delta)


def _add(steps: dict[Mechanism, int], release: Release) -> None:
    mechanism = (release.noise_multiplier, release.sample_rate)
    steps[mechanism] = steps.get(mechanism, 0) + release.steps


def _positive(value: float) -> float:
    if type(value) is not float or not 0 < value < float("inf"):
        raise ValueError(f"expected a positive number, found {value!r}")
    return value
