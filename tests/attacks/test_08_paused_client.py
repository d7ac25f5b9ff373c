"""Attack: a client is paused (SIGSTOP) past its replacement's start, then resumed: while it trains, before it sends.

What holds: while it is paused its lock keeps a replacement out; where a volume's locks bind nobody, the replacement's
first line ends it: it writes nothing more and no update of it leaves.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.fleet import pack
from client.ledger import Ledger, LedgerError, chain, read
from common.messages import ARRAYS
from tests.attacks.owner import noted
from tests.attacks.site import Site, question, refusal, site
from tests.federation import descendants, free_ports, wait_for
from tests.hostile.fleet import Sent
from tests.ledgers import opened, release

TRAINING, SENDING = 0, 1  # partitions, by where they are when the client is paused
HEARD_SECONDS = 5.0


def test_another_writer_is_noticed_before_anything_is_done(path: Path) -> None:
    with opened(path) as ledger:
        reservation = ledger.reserve("m4", release())
        foreign = chain.Entry.after(chain.read(path)[-1], "open", {"epoch": 3})
        with path.open("ab") as file:  # a client that the lock did not stop: a cloned volume, a lost lock
            file.write(foreign.encode())
        for act in (ledger.check, lambda: ledger.commit(reservation), lambda: ledger.reserve("m5", release())):
            with pytest.raises(LedgerError, match="changed by another writer"):
                act()
    assert read(path).head == foreign.hash  # and nothing was written over


def test_a_line_that_came_between_the_check_and_the_write_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = chain.Entry.after(chain.read(path)[-1], "open", {"epoch": 2}).encode()

    def meanwhile(*_: int) -> None:
        with path.open("ab") as file:
            file.write(foreign)

    with opened(path) as ledger:
        monkeypatch.setattr(chain, "_reserve_space", meanwhile)
        with pytest.raises(LedgerError, match="changed by another writer"):
            ledger.reserve("m4", release())
    with pytest.raises(LedgerError):
        read(path)


@contextmanager
def paused_owner(folder: Path, hole: str) -> Iterator[tuple[Site, list[int]]]:
    """A client with both partitions' rounds in flight, all its processes stopped."""
    with site(folder, clients=2, training={"max_workers": 2}) as owner:
        owner.order(noted)
        client = owner.start(around=["-m", "tests.attacks.holes", hole])
        (folder / "hold-send").touch()
        owner.tell(SENDING, Sent.whole(pack(question())))
        wait_for((folder / "sending").exists, "an update that is ready", 120)
        read = len((owner.data / "read").read_text())
        (owner.data / "hold").touch()
        owner.tell(TRAINING, Sent.whole(pack(question())))
        wait_for(lambda: len((owner.data / "read").read_text()) > read, "a worker that trains", 120)
        everyone = [client.pid, *descendants(client.pid)]
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield owner, everyone
        finally:
            for pid in everyone:
                os.kill(pid, signal.SIGCONT)


def replaced_and_resumed(folder: Path, hole: str) -> None:
    with paused_owner(folder, hole) as (owner, everyone):
        paths = [owner.run.ledger_path(name) for name in owner.run.partitions]
        for name, path in zip(owner.run.partitions, paths, strict=True):
            with pytest.raises(LedgerError, match="another client holds it"):
                Ledger.open(path, partition=name, privacy=owner.run.policy.privacy)

        (owner.data / "hold").unlink()
        (folder / "hold-send").unlink()
        # The replacement, elsewhere, on the same volume; it needs the port of the first, which is on another machine.
        owner.run.policy_content["client"]["metrics_address"] = f"127.0.0.1:{free_ports(1)[0]}"
        owner.run.configure()
        owner.start(around=["-m", "tests.attacks.holes", "without_a_lock"], log="replacement")
        for partition in (TRAINING, SENDING):
            assert ARRAYS in owner.ask(partition).content
        after = [path.read_bytes() for path in paths]

        for pid in everyone:
            os.kill(pid, signal.SIGCONT)
        replies = [owner.hear(TRAINING), owner.hear(SENDING, HEARD_SECONDS)]
        assert not [reply for reply in replies if reply and reply.has_content() and ARRAYS in reply.content], "it left"
        assert [path.read_bytes() for path in paths] == after, "the old client wrote"
        assert refusal(replies[0]) == "ledger"  # type: ignore[arg-type]
        wait_for(lambda: "the update is not sent: " in owner.run.log("client"), "what the old client says")


def test_a_resumed_client_sends_and_writes_nothing(tmp_path: Path) -> None:
    replaced_and_resumed(tmp_path, "slow_to_send")


def test_a_client_that_does_not_look_is_seen(tmp_path: Path) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="it left"):
        replaced_and_resumed(tmp_path, "slow_to_send_and_blind")
