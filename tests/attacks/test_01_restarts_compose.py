"""Attack: every process of the federation is restarted between any two of ten rounds, and each round is a run.

What holds: the epsilon of each partition is that of ten rounds composed, by dp-accounting itself; not of one, and not
ten times that of one.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant

from client.accounting import ORDERS
from client.ledger import create
from tests.federation import Federation, descendants, federation, wait_for
from tests.test_workers import lives

LIVES = 10


@dataclass
class Restarted:
    """A federation whose every run is one round and the whole life of its processes."""

    run: Federation
    lives: int = 0

    def live(self) -> None:
        before = len(self.run.processes)
        client, server = self.run.start_client(), self.run.start_server()
        assert server.wait(timeout=180) == 0, self.run.log("server")
        everyone = [client.pid, *descendants(client.pid)]
        client.terminate()
        assert client.wait(timeout=60) == 0, self.run.log("client")
        assert len(everyone) >= 2
        wait_for(lambda: not any(lives(pid) for pid in everyone), "the end of the client's children")
        assert all(process.poll() is not None for process in self.run.processes[before:])
        self.lives += 1

    def check(self) -> None:
        """The ledgers against dp-accounting."""
        privacy = self.run.policy.privacy
        for name in self.run.partitions:
            account = self.run.account(name)
            expected = composed(self.lives, privacy.noise_multiplier, privacy.sample_rate, privacy.delta)
            assert account.commits == self.lives, "a round is missing or was charged twice"
            assert account.epoch == self.lives  # each life opened it
            assert account.epsilon_spent == pytest.approx(expected, rel=1e-9)
            assert account.epsilon_spent < 0.99 * self.lives * composed(1, *_terms(self.run)) or self.lives == 1


def _terms(run: Federation) -> tuple[float, float, float]:
    privacy = run.policy.privacy
    return privacy.noise_multiplier, privacy.sample_rate, privacy.delta


def composed(rounds: int, noise_multiplier: float, sample_rate: float, delta: float) -> float:
    """Epsilon of so many rounds of four steps, by the library alone, over the orders of the ledger."""
    accountant = RdpAccountant(ORDERS)
    accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), 4 * rounds)
    return float(accountant.get_epsilon(delta))


@pytest.mark.timeout(900)
def test_ten_lives_of_one_round_cost_what_ten_rounds_do(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as run:
        restarted = Restarted(run)
        for _ in range(LIVES):
            restarted.live()
        restarted.check()

        # Negative control: a client that begins anew, as one whose accountant lives as long as its process.
        for name in run.partitions:
            run.ledger_path(name).unlink()
            create(run.ledger_path(name), partition=name, privacy=run.policy.privacy)
        with pytest.raises(AssertionError, match="a round is missing"):
            restarted.check()
