"""Kill any process at any moment: no ledger is hurt, no epsilon falls, nothing leaves uncharged, the run goes on."""

import json
import os
import random
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from client.ledger import chain
from tests.federation import Federation, children, command, descendants, federation, wait_for

KILLS = 54  # nine of each kind of process
KINDS = ("host", "zygote", "worker", "server", "superlink", "serverapp")

# Runs the client as it is, and writes down what leaves it, before it leaves.
WITNESS = """
import json, os, sys
from client import fleet, zygote
from common.messages import STANDING, ARRAYS

def witnessed(send):
    def wrapper(self, outbound, seconds):
        message_id = fleet.proto.Message.FromString(outbound.message).metadata.message_id
        message = fleet.unpack(fleet.Inbound(run_id=0, message_id=message_id, envelope=b"", objects=outbound.objects))
        if message.has_content() and ARRAYS in message.content:
            line = json.dumps(dict(message.content[STANDING])) + "\\n"
            fd = os.open("left.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, line.encode())
            os.fsync(fd)
            os.close(fd)
        return send(self, outbound, seconds)
    return wrapper

fleet.Node.send = witnessed(fleet.Node.send)
from client.__main__ import main
sys.exit(main(["--policy", "policy.yaml"]))
"""


class Observer:
    """Watches what must hold at every moment."""

    def __init__(self, run: Federation) -> None:
        self.run = run
        self.spent = dict.fromkeys(run.partitions, 0.0)

    def look(self) -> None:
        for name in self.run.partitions:
            account = self.run.account(name)  # raises when the ledger is not whole
            assert account.epsilon_spent >= self.spent[name], f"{name}: epsilon fell"
            self.spent[name] = account.epsilon_spent

    def check_what_left(self) -> int:
        """Each update that left stands on a commit of its own; returns how many left."""
        path = self.run.folder / "left.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for name in self.run.partitions:
            entries = chain.read(self.run.ledger_path(name))
            # A reply that could not be delivered is sent again: the same update on the same commit.
            heads = {(line["ledger_sequence"], line["ledger_head"]) for line in lines if line["partition"] == name}
            for sequence, head in heads:
                assert entries[sequence - 1].hash == head
                assert entries[sequence - 1].kind == "commit"
        return len(lines)


def victim(kind: str, server: subprocess.Popen[bytes], client: subprocess.Popen[bytes]) -> int | None:
    """A living process of that kind, if there is one now."""
    host, zygotes = client.pid, children(client.pid)
    below = descendants(server.pid)
    found = {
        "host": [host],
        "zygote": zygotes,
        "worker": [worker for zygote in zygotes for worker in children(zygote)],
        "server": [server.pid],
        "superlink": [pid for pid in below if "flower-superlink" in command(pid)],
        "serverapp": [pid for pid in below if "serverapp" in command(pid)],
    }[kind]
    return random.choice(found) if found else None


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_random_kills_of_every_process(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    random.seed(seed)
    with federation(tmp_path, clients=3, fit_clients=2, rounds=100_000, privacy={"noise_multiplier": 30.0}) as run:
        observer = Observer(run)
        server, client = run.start_server(), run.start("client", "-c", WITNESS)
        killed = dict.fromkeys(KINDS, 0)
        while sum(killed.values()) < KILLS:
            kind = min(KINDS, key=lambda kind: (killed[kind], random.random()))
            with suppress(subprocess.TimeoutExpired):  # also in the middle of starting
                server.wait(timeout=random.uniform(0.0, 6.0))
            if (pid := victim(kind, server, client)) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed[kind] += 1
                observer.look()
                if kind in ("host", "zygote"):
                    client.wait(timeout=60)  # a client without its zygote ends by itself
                    client = run.start("client", "-c", WITNESS)
                if kind == "server":
                    server.wait(timeout=60)
            if server.poll() is not None:  # it may also have given up, after so many crashes
                server = run.start_server()
            observer.look()
        before = _rounds(run)
        wait_for(lambda: len(_rounds(run)) >= len(before) + 3, "rounds after the last kill", 120)
        observer.look()
        rounds = _rounds(run)
        assert [line["round"] for line in rounds] == list(range(1, len(rounds) + 1))  # one run, none lost, none twice
        assert len(list((tmp_path / "runs").iterdir())) == 2  # the run and `latest`
        left = observer.check_what_left()
        trained = sum(len(line["trained"]) for line in rounds)
        commits = sum(run.account(name).commits for name in run.partitions)
        print(f"{killed}, {len(rounds)} rounds, {trained} updates used, {left} left, {commits} commits")
        assert trained <= left <= commits + sum(killed.values())


def _rounds(run: Federation) -> list[dict]:
    path = run.folder / "runs/latest/rounds.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
