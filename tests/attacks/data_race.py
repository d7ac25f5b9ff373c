"""`python -m tests.attacks.data_race FOLDER RACES locked|unlocked`: ledgers that commit the same data at one moment.

A program of its own, since it forks, which only a process with one thread may. It prints how many won, for each race.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.accounting import Release
from client.ledger import DataOfAnother, Ledger, create, read, siblings
from common.config import Privacy

RACERS = 6
PRIVACY = Privacy(
    epsilon=8.0, delta=1e-5, noise_multiplier=4.0, max_grad_norm=1.0, batch_size=64, records=700,
    max_steps_per_round=4, accounting="adaptive",
)  # fmt: skip
ROUND = Release(noise_multiplier=4.0, sample_rate=PRIVACY.sample_rate, steps=4)


@contextlib.contextmanager
def unlocked(*_: Any, **__: Any) -> Iterator[None]:
    """The control: everyone looks at the others, but not one at a time."""
    yield


def linger() -> None:
    """Makes the moment between looking and writing long enough to be met by another."""
    look = siblings._fingerprints

    def slowly(path: Path) -> Iterator[str]:
        found = list(look(path))
        time.sleep(0.002)
        return iter(found)

    vars(siblings)["_fingerprints"] = slowly


def race(state: Path) -> int:
    """How many of the racers committed."""
    for racer in range(RACERS):
        create(state / f"p{racer}/ledger.jsonl", partition=f"p{racer}", privacy=PRIVACY)
    gate, opened = os.pipe()
    for racer in range(RACERS):
        if os.fork() == 0:
            status = 1
            try:
                os.close(opened)
                path = state / f"p{racer}/ledger.jsonl"
                ledger = Ledger.open(path, partition=f"p{racer}", privacy=PRIVACY)
                reservation = ledger.reserve("m", ROUND)
                os.read(gate, 1)  # until the parent opens it for all
                with contextlib.suppress(DataOfAnother):
                    ledger.commit(reservation, data="key:same")
                status = 0
            finally:
                os._exit(status)
    while any(read(state / f"p{racer}/ledger.jsonl").sequence < 3 for racer in range(RACERS)):
        time.sleep(0.01)
    os.close(opened)
    os.close(gate)
    assert all(os.wait()[1] == 0 for _ in range(RACERS))
    return sum(read(state / f"p{racer}/ledger.jsonl").commits for racer in range(RACERS))


if __name__ == "__main__":
    linger()
    if sys.argv[3] == "unlocked":
        vars(siblings)["hold"] = unlocked
    print(*(race(Path(sys.argv[1]) / str(number)) for number in range(int(sys.argv[2]))))
