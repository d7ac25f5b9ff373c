"""Attack on the accounting: batches by a shuffled epoch, by a fixed size or by weights, where Poisson is paid for.

What holds: in the batches that the shipped worker trains on, as the task's own loss sees them, each record joins by
itself with the accounted probability, step after step.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from client.noise import SecureGenerator
from common.tasks import Data
from tests.attacks.site import Site, moved, site
from tests.attacks.task import Rigged
from tests.statistics_checks import poisson_checks, rejected

RECORDS, BATCH, STEPS = 40, 20, 500
RATE = BATCH / RECORDS


def watched(task: Rigged) -> None:
    """Each record's target is its number, and the loss writes down whom it meets."""
    seen = task.root / "batches"

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        with seen.open("a") as file:
            file.write(" ".join(map(str, targets.tolist())) + "\n")
        return outputs.sum(1) * 0

    numbered = Data(inputs=torch.ones(RECORDS, 1, 8, 8, dtype=torch.uint8), targets=torch.arange(RECORDS))
    task.patch.setattr(task, "losses", losses)
    task.patch.setattr(task, "owned", lambda *_: numbered)


def sampled(task: Rigged, mask: Callable[[int], Tensor]) -> None:
    watched(task)
    task.patch.setattr(SecureGenerator, "poisson_mask", lambda _self, n, _rate: mask(n))


def shuffled(task: Rigged) -> None:
    """Epochs over a shuffled list, of which every batch takes the next few."""
    left: list[int] = []

    def mask(n: int) -> Tensor:
        if len(left) < BATCH:
            left[:] = torch.randperm(n).tolist()
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[left[:BATCH]] = True
        del left[:BATCH]
        return chosen

    sampled(task, mask)


def of_fixed_size(task: Rigged) -> None:
    sampled(task, lambda n: torch.rand(n).argsort() < BATCH)


def weighted(task: Rigged) -> None:
    sampled(task, lambda n: torch.rand(n) < RATE * torch.linspace(0.8, 1.2, n))


def repeated(task: Rigged) -> None:
    """Every batch is drawn once and trained on twice."""
    kept: list[Tensor] = []
    sampled(task, lambda n: kept.pop() if kept else (kept.append(torch.rand(n) < RATE), kept[0])[1])


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    terms = {"batch_size": BATCH, "records": RECORDS, "max_steps_per_round": STEPS, "epsilon": 1e5, "delta": 1e-5}
    with site(tmp_path_factory.mktemp("sampling"), clients=1, privacy=terms) as made:
        made.start()
        moved(made.ask(0))  # checks the model with its own loss
        yield made


def batches(owner: Site, order: Callable[[Rigged], None], rounds: int) -> np.ndarray:
    """Who joined, bool [steps, records], over some rounds."""
    seen: Path = owner.data / "batches"
    seen.unlink(missing_ok=True)
    owner.order(order)
    # The worker keeps a partition's records: it is a fresh one that obeys.
    owner.end_workers(owner.run.processes[0])  # type: ignore[arg-type]
    before = sum(steps for _, steps in owner.account(0).charged)
    for _ in range(rounds):
        moved(owner.ask(0, steps=STEPS))
    assert sum(steps for _, steps in owner.account(0).charged) == before + rounds * STEPS
    lines = seen.read_text().splitlines()[-rounds * STEPS :]
    masks = np.zeros((len(lines), RECORDS), dtype=bool)
    for mask, line in zip(masks, lines, strict=True):
        mask[[int(number) for number in line.split()]] = True
    return masks


def test_each_record_joins_by_itself_at_the_accounted_rate(owner: Site) -> None:
    masks = batches(owner, watched, rounds=6)
    assert len(masks) >= 6 * STEPS - 1  # an empty batch, which the loss does not meet, comes once in 10^9 runs
    assert rejected(poisson_checks(masks, RATE)) == {}


@pytest.mark.parametrize(
    ("order", "found"),
    [
        (shuffled, "one draw and the next"),
        (of_fixed_size, "batch sizes"),
        (weighted, "every record alike"),
        (repeated, "one draw and the next"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_sampling_is_caught(owner: Site, order: Callable[[Rigged], None], found: str) -> None:
    assert found in rejected(poisson_checks(batches(owner, order, rounds=2), RATE))
