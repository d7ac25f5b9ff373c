"""Attack: many threads, and many processes, charge at the same time when only some charges still fit.

What holds: as many are granted as fit, each stands in the file, and the budget is not exceeded.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from client.ledger import Account, BudgetExhausted, Ledger, LedgerError, create, read
from tests.federation import ROOT
from tests.ledgers import TERMS, opened, release, terms

THREADS, PROCESSES = 16, 6
STEPS = 30  # of one charge in the race of processes: only some fit


def settled(path: Path, granted: int) -> None:
    """Asserts that what was granted is there and is all that fits."""
    account = read(path)
    assert len(account.messages) == granted, "a charge that was granted is not there"
    assert account.epsilon_spent <= account.budget, "more was granted than fits"


def race_of_threads(path: Path, prepare: Callable[[Ledger], None] = lambda _: None) -> None:
    create(path, partition="a", privacy=terms())
    with opened(path) as ledger:
        prepare(ledger)
        fits = ledger.account.rounds_remaining(release())
        granted: list[str] = []
        start = threading.Barrier(THREADS)

        def take(name: str) -> None:
            start.wait()
            for turn in range(fits):
                with suppress(BudgetExhausted):
                    ledger.reserve(f"{name}-{turn}", release())
                    granted.append(name)

        threads = [threading.Thread(target=take, args=(str(number),)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(granted) == fits, "not as many were granted as fit"
    settled(path, len(granted))
    assert read(path).epsilon_with(release()) > terms().epsilon


def test_threads_get_what_fits(tmp_path: Path) -> None:
    race_of_threads(tmp_path / "ledger.jsonl")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_without_a_lock_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: each has looked at the budget before any has written."""
    together, look = threading.Barrier(THREADS), Account.epsilon_with

    def slowly(self: Account, charge: object) -> float:
        epsilon = look(self, charge)  # type: ignore[arg-type]
        with suppress(threading.BrokenBarrierError):
            together.wait(5)
        return epsilon

    def unlock(ledger: Ledger) -> None:
        ledger._lock = nullcontext()  # type: ignore[assignment]

    monkeypatch.setattr(Account, "epsilon_with", slowly)
    with pytest.raises(AssertionError, match=r"granted|there"):
        race_of_threads(tmp_path / "ledger.jsonl", unlock)


RACER = f"""
import sys, time
from pathlib import Path
from client.accounting import Release
from client.ledger import BudgetExhausted, Ledger, LedgerError, chain
from common.config import Privacy
privacy = Privacy(**{TERMS!r})
charge = Release(noise_multiplier=1.5, sample_rate=privacy.sample_rate, steps={STEPS})
if sys.argv[2] == "unlocked":
    chain.fcntl.flock = lambda *_: None
print("ready", flush=True)
sys.stdin.readline()
turn, deadline = 0, time.monotonic() + 120
while time.monotonic() < deadline:
    try:
        ledger = Ledger.open(Path(sys.argv[1]), partition="a", privacy=privacy)
    except LedgerError as error:
        if "another client holds it" in str(error):
            time.sleep(0.001)
            continue
        raise
    try:
        ledger.reserve(f"{{sys.argv[3]}}-{{turn}}", charge)
        turn += 1
    except BudgetExhausted:
        break
    finally:
        ledger.close()
print(turn)
"""


def race_of_processes(path: Path, lock: str) -> int:
    """Each opens, charges and closes until nothing fits; returns how many were granted."""
    create(path, partition="a", privacy=terms())
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), lock, str(number)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ended = [racer.communicate(timeout=200) for racer in racers]
    assert not [errors for _, errors in ended if errors], f"a racer met an error: {ended}"
    granted = sum(int(output) for output, _ in ended)
    settled(path, granted)
    return granted


def test_processes_get_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    granted = race_of_processes(path, "locked")
    assert granted > 2
    assert read(path).epsilon_with(release(STEPS)) > terms().epsilon


def test_processes_without_a_lock_are_seen(tmp_path: Path) -> None:
    """Negative control: they meet each other's lines, or leave a file that nobody can read."""

    def races() -> None:
        for number in range(20):
            race_of_processes(tmp_path / f"{number}/ledger.jsonl", "unlocked")

    with pytest.raises((AssertionError, LedgerError)):
        races()
