"""Attack: the owner's data, exhausted or not, are given another partition name, and with it a second budget.

What holds: a release names its data by a keyed fingerprint in the ledger, and no other ledger beside it may release
the same: of two names that race, one wins. The fingerprint tells nobody without the owner's key anything.
"""

import json
import os
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client.fingerprint import KEY, fingerprint, owner_key
from client.fleet import pack
from client.ledger import DataOfAnother, Ledger, LedgerError, chain, create, read
from common.tasks import Data
from tests.attacks.data_race import PRIVACY, ROUND
from tests.attacks.site import Site, moved, question, refusal, site
from tests.attacks.task import Rigged
from tests.federation import ROOT
from tests.hostile.fleet import Sent

FIRST, SECOND, OTHER, THIRD = range(4)  # two names for the same data, and two for others


def grown(task: Rigged) -> None:
    """The partition's data with its first record once more."""
    records = task.owned

    def more(partition: int, partitions: int) -> Data:
        data = records(partition, partitions)
        return Data(
            inputs=torch.cat([data.inputs, data.inputs[:1]]), targets=torch.cat([data.targets, data.targets[:1]])
        )

    task.patch.setattr(task, "owned", more)


def of_other(task: Rigged) -> None:
    """Whatever the partition, the data of OTHER, in another order."""
    records = task.owned

    def reversed_(_: int, partitions: int) -> Data:
        data = records(OTHER, partitions)
        return Data(inputs=data.inputs.flip(0), targets=data.targets.flip(0))

    task.patch.setattr(task, "owned", reversed_)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("same")) as made:
        made.run.policy_content["partitions"][SECOND]["index"] = FIRST
        made.run.configure()
        yield made


def test_a_second_name_is_no_second_budget(owner: Site) -> None:
    client = owner.start()
    moved(owner.ask(FIRST))
    for _ in range(2):
        reply = owner.ask(SECOND)
        assert refusal(reply) == "data"
        assert reply.content["refusal"]["detail"] == "the data of this partition cannot be used"
        assert "arrays" not in reply.content
    assert (len(owner.account(SECOND).messages), owner.account(SECOND).commits) == (2, 0)  # the charges stay
    moved(owner.ask(OTHER))  # other data, other budget
    owner.order(grown)
    moved(owner.ask(FIRST))
    moved(owner.ask(OTHER))
    owner.order(None)
    moved(owner.ask(FIRST))  # what it had before is still its own
    assert [len(owner.account(name).data) for name in (FIRST, SECOND, OTHER, THIRD)] == [2, 0, 2, 0]

    client = owner.restart(client)
    assert refusal(owner.ask(SECOND)) == "data"
    owner.order(of_other)
    assert refusal(owner.ask(THIRD)) == "data"  # of an earlier entry, in another order
    owner.order(None)
    moved(owner.ask(FIRST))  # and the worker forgets what it held for the other
    moved(owner.ask(THIRD))
    assert "its data are those of" in owner.run.log("client")

    # Nothing of it leaves: not in a metric, a log or a reply, of which the ledger's head is a hash.
    with urllib.request.urlopen(f"http://127.0.0.1:{owner.run.client_metrics}/metrics", timeout=10) as response:
        seen = response.read().decode() + owner.run.log("client")
    for partition in (FIRST, OTHER):
        for known in owner.account(partition).data:
            assert known.partition(":")[2][:8] not in seen
    key = owner.folder / "state/clients" / KEY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600

    # The control: a client that does not look at the other ledgers gives the data a second budget.
    owner.restart(client, variant="second_budget")
    assert refusal(owner.ask(SECOND)) is None


def test_two_clients_that_race_for_the_same_data(tmp_path: Path) -> None:
    """Two processes on one state directory, a name each, both asked before either has trained."""
    with site(tmp_path, clients=2) as made:
        both = [{"name": name, "index": 0, "of": 2} for name in made.run.partitions]
        clients = []
        for each in both:
            made.run.policy_content["partitions"] = [each]
            made.run.policy_content["client"]["metrics_address"] = "127.0.0.1:0"
            made.run.configure()
            clients.append(made.start())
        for partition in range(2):
            made.tell(partition, Sent.whole(pack(question())))
        replies = [made.hear(partition) for partition in range(2)]
        assert all(reply is not None for reply in replies), made.run.log("client")
        assert sorted(str(refusal(reply)) for reply in replies if reply) == ["None", "data"]
        assert sorted(made.account(partition).commits for partition in range(2)) == [0, 1]


def races(folder: Path, count: int, how: str) -> list[int]:
    """How many of several ledgers won, for each race."""
    output = subprocess.check_output(
        [sys.executable, "-m", "tests.attacks.data_race", str(folder), str(count), how],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    return [int(word) for word in output.split()]


def test_of_names_that_race_one_wins(tmp_path: Path) -> None:
    assert races(tmp_path / "locked", 10, "locked") == [1] * 10
    # The control: where they do not look one at a time, several win, sooner or later.
    assert max(races(tmp_path / "unlocked", 10, "unlocked")) > 1


def ledger(folder: Path, name: str) -> Ledger:
    path = folder / name / "ledger.jsonl"
    if not path.exists():
        create(path, partition=name, privacy=PRIVACY)
    return Ledger.open(path, partition=name, privacy=PRIVACY)


def test_a_ledger_from_before_and_a_broken_one_beside_it(tmp_path: Path) -> None:
    old = ledger(tmp_path, "old")
    old.commit(old.reserve("m1", ROUND))  # as it was written before: no data named
    assert "data" not in chain.read(tmp_path / "old/ledger.jsonl")[-1].body
    old.commit(old.reserve("m2", ROUND), data="k:1")
    assert read(tmp_path / "old/ledger.jsonl").data == {"k:1"}
    old.close()

    # Torn, edited, its hashes wrong: no ledger any more, and yet its data have had a budget.
    path = tmp_path / "old/ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"m1"', b'"mx"') + b'{"data": "k:2"')
    with pytest.raises(LedgerError):
        read(path)
    new = ledger(tmp_path, "new")
    with pytest.raises(DataOfAnother, match="no second one"):
        new.commit(new.reserve("m1", ROUND), data="k:1")
    new.commit(new.reserve("m2", ROUND), data="k:3")

    # By another key nothing can be compared.
    third = ledger(tmp_path, "third")
    with pytest.raises(DataOfAnother, match=r"restore the fingerprint\.key"):
        third.commit(third.reserve("m1", ROUND), data="other:3")
    assert third.account.commits == 0
    new.commit(new.reserve("m3", ROUND), data="k:3")
    third.commit(third.reserve("m2", ROUND), data="k:4")  # and refused is not broken


def records(count: int = 50) -> Data:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(256, (count, 8, 8), dtype=torch.uint8, generator=generator)
    return Data(inputs=inputs, targets=torch.randint(10, (count,), generator=generator))


def test_a_fingerprint_is_of_the_records_and_of_the_key() -> None:
    data, key = records(), bytes(range(32))
    mine = fingerprint(data, key)
    order = torch.randperm(50)
    assert fingerprint(Data(inputs=data.inputs[order], targets=data.targets[order]), key) == mine

    def changed(**parts: Any) -> str:
        return fingerprint(Data(**{"inputs": data.inputs, "targets": data.targets, **parts}), key)

    flipped = data.inputs.clone()
    flipped[17, 3, 3] ^= 1
    others = [
        changed(inputs=flipped),
        changed(targets=data.targets.roll(1)),
        changed(inputs=data.inputs.int()),
        changed(inputs=data.inputs.flatten(1)),
        changed(inputs=data.inputs[1:], targets=data.targets[1:]),
        changed(inputs=torch.cat([data.inputs, data.inputs]), targets=torch.cat([data.targets, data.targets])),
        fingerprint(data, bytes(32)),
    ]
    assert len({mine, *others}) == 1 + len(others)
    assert len({each.partition(":")[0] for each in (mine, *others[:-1])}) == 1  # one key, one name of it
    assert others[-1].partition(":")[0] != mine.partition(":")[0]
    for shape in ((50,), (50, 0), (50, 1)):  # whatever a record looks like
        changed(inputs=torch.zeros(shape, dtype=torch.bfloat16))


MAKE = """
import os, sys
from pathlib import Path
from client.fingerprint import owner_key

for _ in range(4):
    if os.fork() == 0:
        print(owner_key(Path(sys.argv[1])).hex(), flush=True)
        os._exit(0)
assert all(os.wait()[1] == 0 for _ in range(4))
"""


def test_the_key_is_made_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.check_output(command, env=environment, text=True).split()
    assert len(printed) == 4
    keys = {*printed, owner_key(tmp_path).hex()}
    assert len(keys) == 1
    assert len(keys.pop()) == 64
    assert [path.name for path in tmp_path.iterdir()] == [KEY]
    (tmp_path / KEY).write_bytes(b"short")
    with pytest.raises(ValueError, match="restore it"):
        owner_key(tmp_path)


def test_an_entry_that_names_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a/ledger.jsonl"
    mine = ledger(tmp_path, "a")
    mine.reserve("m1", ROUND)
    mine.close()
    entry = chain.Entry.after(chain.read(path)[-1], "commit", {"reservation": 3, "data": json.loads("[1]")})
    with open(path, "ab") as file:
        file.write(entry.encode())
    with pytest.raises(LedgerError, match="fingerprint"):
        read(path)
