"""Attack: two clients on one partition, first on one volume, then with a clone of it, its keys and its ledgers.

What holds: on one volume the lock lets one in. A clone has a lock of its own: it is kept out by the server's rule of
one live node for a key and, once it is in, by the server's anchors: of two ledgers that part only one goes on. Not
caught: a server that lets both in and tells the clone of no anchor. Each ledger then counts only what it paid for.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Message

from client.ledger import Account, LedgerError, read
from common.messages import ARRAYS, STANDING
from tests.attacks.site import Site, refusal, site
from tests.federation import ROOT, descendants, free_ports, wait_for
from tests.hostile.liar import HONEST, SPARE, Liar
from tests.ledgers import TERMS, opened

SEVERAL_TRIES = 5.0  # seconds: a client tries again after about 1, 2, 4 s
CALL_SECONDS = 1.0

HOLD = """
import sys
from client.ledger import Ledger
from common.config import Privacy
ledger = Ledger.open(__import__("pathlib").Path(sys.argv[1]), partition="a", privacy=Privacy(**eval(sys.argv[2])))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), repr(TERMS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(LedgerError, match="another client holds it"), opened(path):
            pass
    finally:
        first.kill()
        first.communicate()
    with opened(path):
        pass


def test_another_name_of_the_same_file_is_locked_too(tmp_path: Path, path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.link(path, tmp_path / "elsewhere/hard.jsonl")
    os.symlink(path, tmp_path / "elsewhere/soft.jsonl")
    with opened(path):
        for other in (tmp_path / "elsewhere").iterdir():
            with pytest.raises(LedgerError, match="another client holds it"), opened(other):
                pass


def test_the_lock_does_not_see_a_clone(tmp_path: Path, path: Path) -> None:
    """Why the server has to; and the negative control of the two tests before."""
    shutil.copytree(path.parent, tmp_path / "clone")
    with opened(path), opened(tmp_path / "clone/ledger.jsonl"):
        pass


def second(policy: dict[str, Any], names: list[dict[str, Any]]) -> dict[str, Any]:
    """The policy of a client whose ledgers are the clone."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    settings = policy["client"] | {"metrics_address": address, "state": "state/clone"}
    return policy | {"partitions": names, "client": settings}


def test_a_server_of_flowers_lets_one_holder_of_a_key_live(liar: Liar) -> None:
    run = liar.run
    twice, own = run.partitions[HONEST], run.partitions[SPARE]
    shutil.copytree(run.folder / "state/clients", run.folder / "state/clone")
    everyone = [{"name": name, "index": index, "of": len(run.partitions)} for index, name in enumerate(run.partitions)]
    content = second(run.policy_content, [everyone[HONEST], everyone[SPARE]])
    (run.folder / "clone.yaml").write_text(yaml.safe_dump(content))
    process = run.start("clone", "-m", "client", "--policy", "clone.yaml")

    def says(words: str) -> bool:
        return any(words in line for line in run.log("clone").splitlines())

    wait_for(lambda: says(f"{own}: connected"), "the partition that only the clone holds", 120)
    wait_for(lambda: says(f"{twice}: not connected"), "what the server says of the other", 60)
    time.sleep(SEVERAL_TRIES)
    assert says("another live client uses it")
    assert not says(f"{twice}: connected")
    reply = liar.ask(HONEST, liar.honest())
    assert "arrays" in reply["records"], reply  # it went to the first, who trained
    assert not read(run.folder / f"state/clone/{twice}/ledger.jsonl").commits
    process.terminate()
    assert process.wait(60) == 0


class Clones:
    """A client and its clone behind a server that lets both in; only one of them runs at a time."""

    def __init__(self, owner: Site) -> None:
        self.owner = owner
        self.first = owner.start()
        (self.name,) = owner.run.partitions
        self.path = owner.run.ledger_path(self.name)
        self.clone_path = owner.folder / f"state/clone/{self.name}/ledger.jsonl"

    def start_clone(self) -> None:
        run = self.owner.run
        shutil.copytree(run.folder / "state/clients", run.folder / "state/clone")
        content = second(run.policy_content, run.policy_content["partitions"])
        (run.folder / "clone.yaml").write_text(yaml.safe_dump(content))
        self.clone = run.start("clone", "-m", "client", "--policy", "clone.yaml")
        wait_for(lambda: ": connected\n" in run.log("clone"), "the clone to connect", 120)

    def ask(self, process: subprocess.Popen[bytes], seen: Account | None) -> Message:
        """What this one answers, with an anchor of that ledger, while the other stands still."""
        other = self.clone if process is self.first else self.first
        with still(other):
            if seen is None:
                return self.owner.ask(0)
            return self.owner.ask(0, anchor_sequence=seen.sequence, anchor_head=seen.head)


@contextmanager
def still(process: subprocess.Popen[bytes]) -> Iterator[None]:
    everyone = [process.pid, *descendants(process.pid)]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(CALL_SECONDS)  # what it had asked for is answered before there is anything to be had
    try:
        yield
    finally:
        for pid in everyone:
            os.kill(pid, signal.SIGCONT)


def test_of_two_ledgers_that_part_an_honest_servers_anchor_keeps_one(tmp_path: Path) -> None:
    with site(tmp_path, clients=1) as owner:
        clones = Clones(owner)
        assert ARRAYS in owner.ask(0).content
        clones.start_clone()
        newest = read(clones.path)

        # The first goes on. The clone, asked with what the server knows since, is behind and refuses.
        first = clones.ask(clones.first, newest)
        assert ARRAYS in first.content
        newest = read(clones.path)
        assert first.content[STANDING]["ledger_head"] == newest.head
        assert refusal(clones.ask(clones.clone, newest)) == "rollback"
        assert read(clones.clone_path).commits == 1

        # Not caught, and so the negative control: a server that lets both in and tells the clone of no anchor.
        assert ARRAYS in clones.ask(clones.clone, None).content
        assert read(clones.clone_path).commits == 2
        # Three rounds were released, and each ledger knows of two.
        assert read(clones.path).epsilon_spent == read(clones.clone_path).epsilon_spent

        # Once an honest server has seen the clone's, the first is refused: never both.
        assert refusal(clones.ask(clones.first, read(clones.clone_path))) == "rollback"
        assert read(clones.path).commits == 2
