"""Attack: the volume with the ledgers becomes read-only, or vanishes, while a client that has it open goes on.

What holds: no record is read where the charge cannot be written, no update leaves where the commit cannot, the alarm is
raised, and a volume that is back is good for a new start only. Real mounts, in a namespace of the client's own.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from client import ledger
from client.fleet import pack
from common.tasks import Data
from tests.attacks.site import Site, moved, question, refusal, site
from tests.attacks.task import Rigged
from tests.federation import metrics, wait_for
from tests.hostile.fleet import Sent

PARTITIONS = range(2)
VOLUME = "state/clients"
HOLD_SECONDS = 60.0

# Runs a command with a volume of its own for the ledgers: nobody else sees the mount, and it ends with the command.
MOUNTED = """
import os, sys
os.execvp("unshare", ["unshare", "-m", "sh", "-c", sys.argv[1] + ' && exec "$@"', "sh", *sys.argv[2:]])
"""
EXT4 = f"mount -o loop volume.img {VOLUME}"
TMPFS = f"mount -t tmpfs tmpfs {VOLUME} && cp -a before/. {VOLUME}/"


@cache
def can(mount: str) -> bool:
    """Whether this machine lets us mount so."""
    script = {
        EXT4: "d=$(mktemp -d) && truncate -s 8M $d/i && mkfs.ext4 -q $d/i && mount -o loop $d/i /mnt"
        " && umount /mnt && rm -r $d",
        TMPFS: "mount -t tmpfs tmpfs /mnt",
    }[mount]
    return (
        os.geteuid() == 0 and subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True).returncode == 0
    )


def watched(task: Rigged) -> None:
    """Notes when somebody reads the records; then waits for the file `go`."""
    owned, root = task.owned, task.root

    def noted(partition: int, partitions: int) -> Data:
        with (root / "read").open("a") as file:
            file.write("x")
        deadline = time.monotonic() + HOLD_SECONDS
        while not (root / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return owned(partition, partitions)

    task.patch.setattr(task, "owned", noted)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path, clients=len(PARTITIONS)) as made:
        (made.data / "go").touch()
        yield made


def start(owner: Site, mount: str, variant: str | None = None) -> subprocess.Popen[bytes]:
    """The client, with its ledgers on a volume that only it sees."""
    volume = owner.folder / VOLUME
    if mount == EXT4:
        image = owner.folder / "volume.img"
        command = ["mkfs.ext4", "-q", "-d", str(volume), str(image), "16M"]
        subprocess.run(command, check=True, capture_output=True)
    else:
        shutil.copytree(volume, owner.folder / "before")
    for path in volume.iterdir():  # beneath the mount lies nothing
        shutil.rmtree(path)
    return owner.start(around=["-c", MOUNTED, mount], variant=variant)


def aborts(client: subprocess.Popen[bytes], volume: Path) -> None:
    """What the kernel does to an ext4 on a failing disk: nothing can be written any more."""
    subprocess.run(["nsenter", "-t", str(client.pid), "-m", "mount", "-o", "remount,abort", str(volume)], check=True)


def detaches(client: subprocess.Popen[bytes], volume: Path) -> None:
    subprocess.run(["nsenter", "-t", str(client.pid), "-m", "umount", "-l", str(volume)], check=True)


FAULTS = [(EXT4, aborts), (TMPFS, detaches)]
Fault = Callable[[subprocess.Popen[bytes], Path], None]


def reads(owner: Site) -> int:
    path = owner.data / "read"
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize(("mount", "fault"), FAULTS, ids=["read-only", "vanished"])
def test_without_its_volume_a_client_reads_and_sends_nothing(owner: Site, mount: str, fault: Fault) -> None:
    if not can(mount):
        pytest.skip("no mount without root and a loop device")
    client = start(owner, mount)
    volume = owner.folder / VOLUME
    moved(owner.ask(0))
    owner.order(watched)
    there = Path(f"/proc/{client.pid}/root{volume}")
    assert ledger.read(there / owner.run.partitions[0] / "ledger.jsonl").commits == 1

    # Between the charge and the commit.
    (owner.data / "go").unlink()
    owner.tell(1, Sent.whole(pack(question())))
    wait_for(lambda: reads(owner) == 1, "the records to be read", 60)
    fault(client, volume)
    (owner.data / "go").touch()
    reply = owner.hear(1)
    assert reply is not None, owner.run.log("client")
    assert refusal(reply) == "ledger"
    assert "arrays" not in reply.content

    # Before the charge.
    for partition in (0, 1, 0):
        reply = owner.ask(partition)
        assert refusal(reply) == "ledger"
        assert reply.content["refusal"]["detail"] == "the ledger of this partition cannot be used"
    assert reads(owner) == 1, "records were read for nothing that was paid"
    seen = metrics(owner.run.client_metrics)
    assert [seen["fl_privacy_ledger_ok", name] for name in owner.run.partitions] == [0, 0]
    assert client.poll() is None, "it lives, and goes on saying so"
    assert "Traceback" not in owner.run.log("client")


@pytest.mark.parametrize(("mount", "fault"), FAULTS, ids=["read-only", "vanished"])
def test_a_client_that_goes_on_without_is_caught(owner: Site, mount: str, fault: Fault) -> None:
    if not can(mount):
        pytest.skip("no mount without root and a loop device")
    client = start(owner, mount, variant="trusts_its_disk")
    moved(owner.ask(0))
    fault(client, owner.folder / VOLUME)
    moved(owner.ask(0))  # an update that no ledger knows


def test_a_folder_that_is_moved_away_and_back(owner: Site) -> None:
    """As far as one gets without root."""
    client = owner.start()
    moved(owner.ask(0))
    volume, away = owner.folder / VOLUME, owner.folder / "away"
    volume.rename(away)
    assert refusal(owner.ask(0)) == "ledger"
    volume.mkdir()  # as an empty volume in its place
    assert refusal(owner.ask(0)) == "ledger"
    volume.rmdir()
    away.rename(volume)
    assert refusal(owner.ask(0)) == "ledger"  # it was wrong once: until a start that has read all of it, it stays so
    assert owner.account(0).commits == 1
    owner.restart(client)
    moved(owner.ask(0))
    assert owner.account(0).commits == 2


def test_beneath_the_volume_lies_an_old_copy(owner: Site) -> None:
    """What shows when a volume is gone is another file: the client that has the true one open does not take it."""
    if not can(TMPFS):
        pytest.skip("no mount without root")
    volume = owner.folder / VOLUME
    shutil.copytree(volume, owner.folder / "before")
    client = owner.start(around=["-c", MOUNTED, TMPFS])  # over the ledgers as they were made
    moved(owner.ask(0))
    detaches(client, volume)
    assert refusal(owner.ask(0)) == "ledger"
    assert "replaced by another file" in owner.run.log("client")
    assert owner.account(0).commits == 0
