"""Attack: a delta of 1/n or more, which would allow to publish one record outright, over a nominal n or the real one.

What holds: a policy with such a delta starts no client, and a partition that really holds more records than the policy
says releases nothing, and does not tell how many it holds.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from client import app
from common.tasks import Data
from tests.attacks.site import Site, moved, refusal, site
from tests.attacks.task import Rigged
from tests.federation import federation

DELTA, NOMINAL = 0.01, 50  # fine for the nominal count, and for up to 99 records


def holding(task: Rigged, count: int) -> None:
    inputs = torch.arange(count * 64, dtype=torch.int64).remainder(17).to(torch.uint8).view(count, 1, 8, 8)
    task.patch.setattr(task, "owned", lambda *_: Data(inputs=inputs, targets=torch.arange(count) % 10))


def of_99_records(task: Rigged) -> None:
    holding(task, 99)


def of_100_records(task: Rigged) -> None:
    holding(task, 100)


def of_100_records_uncounted(task: Rigged) -> None:
    """The control: a client that believes the nominal count."""
    holding(task, 100)
    task.patch.setattr(app, "len", lambda part: min(NOMINAL, len(part)), raising=False)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    terms = {"records": NOMINAL, "batch_size": 10, "delta": DELTA}
    with site(tmp_path_factory.mktemp("delta"), clients=4, privacy=terms) as made:
        made.start()
        yield made


def test_a_delta_of_one_over_the_real_count_releases_nothing(owner: Site) -> None:
    owner.order(of_100_records)
    said = len(owner.run.log("client"))
    for _ in range(2):  # neither the first time nor later
        reply = owner.ask(1)
        assert refusal(reply) == "data"
        detail = reply.content["refusal"]["detail"]
        assert detail == "delta is not below 1/n for the data of this partition"
        assert not re.search(r"\b100\b", owner.run.log("client")[said:])
    assert (len(owner.account(1).messages), owner.account(1).commits) == (2, 0)
    owner.order(of_99_records)
    moved(owner.ask(2))

    owner.order(of_100_records_uncounted)
    moved(owner.ask(1))  # the control releases


@pytest.mark.parametrize(("delta", "starts"), [(0.02, False), (0.5, False), (0.0199, True)])
def test_a_policy_whose_delta_is_too_large_starts_nothing(tmp_path: Path, delta: float, starts: bool) -> None:
    with federation(tmp_path) as run:
        run.policy_content["privacy"] |= {"records": NOMINAL, "batch_size": 10, "delta": delta}
        run.policy_content["client"]["metrics_address"] = "198.51.100.1:9464"  # where one that starts ends
        run.configure()
        client = run.start_client()
        status = client.wait(timeout=120)
        assert status == (1 if starts else 2), run.log("client")
        assert ("privacy.delta: expected below 1/records = 0.02" in run.log("client")) == (not starts)
        assert [run.account(name).commits for name in run.partitions] == [0, 0]
