"""Attack: SIGKILL, an error, a cut-short write or a full disk at every system call that the ledger makes.

Holds: the file has its old or its new content, never half of a line; what was acknowledged is there; after an error
nothing more is charged. The calls are the kernel's own list (ptrace), so one that is not walked cannot exist.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from client.ledger import LedgerError, create, read
from tests import syscalls
from tests.federation import ROOT
from tests.ledgers import MEMORY, mounted, opened, release, terms

# What changes a file, a name or the disk in a ledger's creation, and in its opening with a raised budget and two
# rounds with an anchor: one more or one less is another ledger than the one that was walked through.
CHANGES = {
    "starting": {"mkdir": 1, "write": 1, "fsync": 2, "link": 1, "unlink": 1},
    "serving": {"fallocate": 6, "write": 12, "fsync": 18, "rename": 6, "mkdir": 6},
}


def walk(folder: Path | str, breaks: str = "") -> subprocess.CompletedProcess[str]:
    """The walk in a process of its own, which forks; `breaks` is done to the ledger's code first."""
    code = f"import os, sys; from pathlib import Path; from client.ledger import chain; {breaks}\n"
    code += "from tests import ledger_faults; ledger_faults.main(Path(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_system_call_may_fail_or_be_the_last() -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        done = walk(folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for life, walked in found["walks"].items():
        calls = Counter(walked["calls"])
        print(f"{life}: {calls.total()} system calls, {walked['faults']} faults, each in a process: {dict(calls)}")
        assert {name: count for name, count in calls.items() if name in syscalls.WRITERS} == CHANGES[life]
        assert walked["faults"] == sum(len(syscalls.kinds(call)) for call in walked["calls"])
    assert set(found["walks"]) == set(CHANGES)
    assert found["full"] > 50  # each number of bytes short of a line
    assert found["wrong"] == []


@pytest.mark.parametrize(
    "breaks",
    [
        "chain.Chain.append = lambda self, kind, body: chain.Entry.after(self.entries[-1], kind, body)",
        "chain._write_all = lambda fd, data: os.write(fd, data[:-1])",
    ],
    ids=["forgets", "tears"],
)
def test_the_walk_finds_a_broken_ledger(tmp_path: Path, breaks: str) -> None:
    """Negative control: a ledger that acknowledges what it did not write, or that leaves half a line."""
    done = walk(tmp_path, breaks)
    assert done.returncode != 0 or json.loads(done.stdout)["wrong"]


SEEN = """
import ctypes, json, os, sys
from tests import syscalls

def life():
    ctypes.CDLL(None).write(fd, b"beside os", 9)
    ctypes.CDLL(None).syscall(int(sys.argv[2]))

fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print(json.dumps([call for call in syscalls.trace(life, ignore=-1) if call in syscalls.WRITERS]))
"""


@pytest.mark.parametrize(("number", "expected"), [("-1", "LookupError"), (None, "")])
def test_no_call_escapes_the_walk(tmp_path: Path, number: str | None, expected: str) -> None:
    """Negative control: a write that goes around Python's `os` is seen, and a call without a name is an error."""
    getpid = {"x86_64": "39", "aarch64": "172"}[os.uname().machine]
    done = subprocess.run(
        [sys.executable, "-c", SEEN, str(tmp_path / "file"), number or getpid],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in done.stderr
    assert number or json.loads(done.stdout) == ["write"]


def test_a_full_disk_keeps_what_was_charged(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=32k"):
        path, filler = tmp_path / "disk/ledger.jsonl", tmp_path / "disk/filler"
        create(path, partition="a", privacy=terms())
        filler.write_bytes(bytes(16_000))
        charged: list[str] = []
        with opened(path) as ledger:

            def fill() -> None:
                for number in range(1000):
                    ledger.reserve(f"m{number}", release(steps=1))
                    charged.append(f"m{number}")

            with pytest.raises(LedgerError, match="No space left on device"):
                fill()
            with pytest.raises(LedgerError, match="No space left on device"):
                ledger.reserve("again", release(steps=1))
        assert len(charged) > 3
        assert read(path).messages == set(charged)
        filler.unlink()
        with opened(path) as ledger:
            assert ledger.account.messages == set(charged)
            ledger.commit(ledger.reserve("the next", release(steps=1)))
