"""One owner's client for the attacks on its ledgers: ten partitions, some of whose ledgers were tampered with."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

from flwr.app import Message

from client.ledger import Head, Ledger
from client.policy import worst_round
from common.messages import ARRAYS, REFUSAL
from common.tasks import Data
from tests.attacks.site import Site, refusal, site
from tests.attacks.task import Rigged
from tests.federation import children, metrics

HOLD_SECONDS = 120.0


class Part(IntEnum):
    """The partitions, by what happens to each."""

    KILLED = 0
    TWICE = 1
    RUNS = 2
    MISSING = 3
    OLD = 4
    OLD_WITHOUT_ANCHOR = 5
    BYTE = 6
    DROPPED = 7
    SWAPPED = 8
    TORN = 9


class Owner:
    """The client and its site; `seen` is what an honest server remembers of each ledger."""

    def __init__(self, made: Site, hole: str | None) -> None:
        self.site = made
        self.seen: dict[Part, Head] = {}
        self.before: dict[Part, float] = {}  # epsilon spent, before the ledger was tampered with
        self._hole = hole
        for part in Part:
            self._use(part)
        self.start()

    def start(self) -> None:
        around = ["-m", "tests.attacks.holes", self._hole] if self._hole else []
        self.client = self.site.start(around=around)

    def restart(self) -> None:
        self.client.terminate()
        assert self.client.wait(60) == 0, self.log()
        self.start()

    def path(self, part: int) -> Path:
        return self.site.run.ledger_path(self.site.run.partitions[part])

    def anchor(self, part: int) -> Path:
        path = self.site.run.policy.anchor_path(self.site.run.partitions[part])
        assert path is not None
        return self.site.folder / path

    def log(self) -> str:
        return self.site.run.log("client")

    def ask(self, part: int, **changes: Any) -> Message:
        return self.site.ask(part, **changes)

    def records_read(self) -> int:
        path = self.site.data / "read"
        return len(path.read_text()) if path.exists() else 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Whoever reads the records waits."""
        hold = self.site.data / "hold"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    def process(self, kind: str) -> int:
        """The host, its zygote or its worker."""
        if kind == "host":
            return self.client.pid
        (zygote,) = children(self.client.pid)
        if kind == "zygote":
            return zygote
        (worker,) = children(zygote)
        return worker

    def _use(self, part: Part) -> None:
        """Two rounds before today; then what the attack does to the file."""
        run = self.site.run
        name, path, anchor = run.partitions[part], self.path(part), self.anchor(part)
        privacy = run.policy.privacy
        ledger = Ledger.open(path, partition=name, privacy=privacy, anchor=anchor)
        ledger.commit(ledger.reserve("old 1", worst_round(privacy)))
        old = path.read_bytes()
        ledger.commit(ledger.reserve("old 2", worst_round(privacy)))
        ledger.close()
        self.seen[part] = Head(sequence=ledger.account.sequence, hash=ledger.account.head)
        self.before[part] = ledger.account.epsilon_spent
        lines = path.read_bytes().splitlines(keepends=True)  # create, open, reserve, commit, reserve, commit
        match part:
            case Part.MISSING:
                path.unlink()
                anchor.unlink()
            case Part.OLD:
                path.write_bytes(old)
            case Part.OLD_WITHOUT_ANCHOR:
                path.write_bytes(old)
                anchor.unlink()
            case Part.BYTE:  # a cheaper round than the one that was trained
                lines[4] = lines[4].replace(b'"steps":4', b'"steps":1')
            case Part.DROPPED:
                del lines[4]
            case Part.SWAPPED:
                lines[2], lines[4] = lines[4], lines[2]
            case Part.TORN:
                lines[5] = lines[5][:20]
        if part in (Part.BYTE, Part.DROPPED, Part.SWAPPED, Part.TORN):
            assert path.read_bytes() != b"".join(lines)
            path.write_bytes(b"".join(lines))


@contextmanager
def owner(folder: Path, hole: str | None = None) -> Iterator[Owner]:
    """The honest client, or one with a hole from `tests.attacks.holes`."""
    with site(folder, clients=len(Part), privacy={"noise_multiplier": 30.0}) as made:
        made.run.policy_content["client"]["anchors"] = "state/anchors"
        made.run.configure()
        made.order(noted)
        yield Owner(made, hole)


def noted(task: Rigged) -> None:
    """Notes when somebody reads the records; then waits while the file `hold` is there."""
    owned, root = task.owned, task.root

    def watched(partition: int, partitions: int) -> Data:
        with (root / "read").open("a") as file:
            file.write("x")
        deadline = time.monotonic() + HOLD_SECONDS
        while (root / "hold").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return owned(partition, partitions)

    task.patch.setattr(task, "owned", watched)


def refuses(owner: Owner, part: Part, reason: str, **anchor: Any) -> None:
    """Asserts that this partition trains nothing, writes nothing, raises the alarm, and says no more than why."""
    path, read = owner.path(part), owner.records_read()
    content = path.read_bytes() if path.exists() else b""
    reply = owner.ask(part, **anchor)
    assert reply.has_content()
    assert ARRAYS not in reply.content, "it trained"
    assert refusal(reply) == reason
    assert "ledger.jsonl" not in str(reply.content[REFUSAL]["detail"])
    assert owner.records_read() == read
    after = path.read_bytes() if path.exists() else b""
    assert after.startswith(content)
    assert b'"reserve"' not in after[len(content) :]  # it may have been opened, to be compared with the anchor
    shown = metrics(owner.site.run.client_metrics)
    assert shown["fl_privacy_ledger_ok", owner.site.run.partitions[part]] == 0


def others_train(owner: Owner) -> None:
    """One partition's spoiled ledger stops no other: so the refusals above are about that file."""
    before = owner.site.account(Part.RUNS)
    assert ARRAYS in owner.ask(Part.RUNS).content
    assert owner.site.account(Part.RUNS).commits == before.commits + 1
