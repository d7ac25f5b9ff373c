"""Ends a process, or fails its calls, at each system call that a ledger makes: `python -m tests.ledger_faults FOLDER`.

A program of its own, since it forks for each point, which only a process with one thread may. It prints JSON: the calls
that it walked through, and what was found wrong.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from client.accounting import Release
from client.ledger import Ledger, LedgerError, chain, create, read, writer
from common.config import Privacy

PRIVACY = Privacy(
    epsilon=8.0, delta=1e-5, noise_multiplier=1.0, max_grad_norm=1.0, batch_size=64, records=700,
    max_steps_per_round=11, accounting="adaptive",
)  # fmt: skip
RAISED = PRIVACY.model_copy(update={"epsilon": 9.0})
ROUND = Release(noise_multiplier=1.0, sample_rate=PRIVACY.sample_rate, steps=11)

# All of `os` that changes or pins something, also where pathlib calls it.
OS_CALLS = ("open", "write", "fsync", "ftruncate", "link", "close", "unlink", "replace", "mkdir")
KINDS = ("kill before", "kill after", "refuse", "fail after", "tear", "short")


class Faults:
    """Counts the calls that it is put around, and does `kind` to the `at`-th."""

    def __init__(self, kind: str, at: int) -> None:
        self.names: list[str] = []
        self._kind = kind
        self._at = at

    def install(self) -> None:
        for name in OS_CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))
        fcntl.flock = self._around("flock", fcntl.flock)
        chain._libc = SimpleNamespace(fallocate=self._around("fallocate", chain._libc.fallocate))  # type: ignore[assignment]
        writer.open = self._open  # type: ignore[attr-defined]

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.names.append(name)
            kind = self._kind if len(self.names) == self._at else None
            if kind == "kill before":
                die()
            if kind == "refuse":
                return self._error(name, errno.ENOSPC)
            if kind in ("tear", "short") and name == "write":
                fd, data = arguments
                written = call(fd, data[: len(data) // 2])
                if kind == "tear":
                    die()
                return written
            result = call(*arguments, **options)
            if kind == "kill after":
                die()
            if kind == "fail after":
                return self._error(name, errno.EIO)
            return result

        return wrapped

    @staticmethod
    def _error(name: str, number: int) -> int:
        if name != "fallocate":
            raise OSError(number, os.strerror(number))
        ctypes.set_errno(number)
        return -1

    def _open(self, *arguments: Any, **options: Any) -> Any:
        file = self._around("open", open)(*arguments, **options)
        return _File(
            file, flush=self._around("write", lambda *_: file.flush()), close=self._around("close", file.close)
        )


class _File:
    """A file object whose buffer reaches the system in `flush`."""

    def __init__(self, file: Any, *, flush: Callable[..., Any], close: Callable[[], None]) -> None:
        self.write, self.fileno = file.write, file.fileno
        self.flush = lambda: flush(None, b"")  # as `write` looks to a fault
        self._close = close

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def starting(folder: Path, said: Callable[[str], None]) -> None:
    """The creation of a ledger."""
    create(folder / "new/ledger.jsonl", partition="a", privacy=PRIVACY, anchor=folder / "anchors/a.json")
    said("create")


def serving(folder: Path, said: Callable[[str], None]) -> None:
    """A client's life with a ledger: three lines as it starts and raises the budget, two for each of two rounds."""
    ledger = Ledger.open(folder / "ledger.jsonl", partition="a", privacy=RAISED, anchor=folder / "anchors/a.json")
    said("open")
    said("budget")
    try:
        for number in range(2):
            reservation = ledger.reserve(f"new {number}", ROUND)
            said("reserve")
            ledger.commit(reservation)
            said("commit")
    except LedgerError:
        try:
            ledger.reserve("after an error", ROUND)
        except LedgerError:
            raise
        said("charged after an error")


def walk(folder: Path, life: Callable[..., None], kind: str) -> tuple[list[str], list[str]]:
    """Runs `life` in children, one for each call that it makes. Returns the calls, and what was wrong."""
    wrong: list[str] = []
    at = 0
    while True:
        at += 1
        here = folder / "here"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(folder / "before", here)
        names, said, problem = run(here, life, Faults(kind, at))
        if problem:
            wrong.append(f"{life.__name__}, {kind} call {at}: {problem}")
        if len(names) >= at or (not names and "ended" not in said):
            path = here / ("new/ledger.jsonl" if life is starting else "ledger.jsonl")
            finding = judge(path, folder / "before/ledger.jsonl", said, kind, here / "anchors/a.json")
            if finding:
                wrong.append(f"{life.__name__}, {kind} call {at}: {finding}")
        if "ended" in said and len(names) < at:
            return names, wrong


def run(here: Path, life: Callable[..., None], faults: Faults) -> tuple[list[str], list[str], str | None]:
    """What the child called and said, and the error that it should not have raised."""
    ours, theirs = os.pipe()
    write = os.write
    child = os.fork()
    if child == 0:
        status = {"names": faults.names, "problem": None}
        try:
            faults.install()
            life(here, lambda word: write(theirs, f"{word}\n".encode()))
        except LedgerError as error:
            status["problem"] = "several lines" if "\n" in str(error) else None
        except BaseException as error:
            status["problem"] = f"{type(error).__name__}: {error}"
        write(theirs, f"ended\n{json.dumps(status)}\n".encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        said = pipe.read().splitlines()
    os.waitpid(child, 0)
    if "ended" not in said:
        return [], said, None
    status = json.loads(said.pop())
    return status["names"], said, status["problem"]


def judge(path: Path, before: Path, said: list[str], kind: str, anchor: Path) -> str | None:
    """What is wrong with the ledger that a fault left behind."""
    if "charged after an error" in said:
        return "a ledger that had met an error charged again"
    promised = [word for word in said if word != "ended"]
    new = path.parent.name == "new"
    if new and not path.exists():
        if promised:
            return "a created ledger is gone"
        create(path, partition="a", privacy=PRIVACY)
    old = b"" if new else before.read_bytes()
    content = path.read_bytes()
    if not content.startswith(old):
        return "old lines changed"
    if kind == "tear" and not content.endswith(b"\n"):
        try:
            read(path)
        except LedgerError as error:
            return None if "torn" in str(error) else str(error)
        return "a torn line was read"
    try:
        account = read(path)
        lines = content[len(old) :].count(b"\n")
        on_the_way = 1 if promised else 2  # opening writes two lines before it says so
        if not len(promised) <= lines <= len(promised) + on_the_way:
            return f"{len(promised)} lines were promised, {lines} are there"
        ledger = Ledger.open(path, partition="a", privacy=PRIVACY, anchor=None if new else anchor)
        if ledger.account.epsilon_spent < account.epsilon_spent or ledger.account.messages != account.messages:
            return "opening it changed what was spent"
        ledger.commit(ledger.reserve("the next", ROUND))
        ledger.close()
    except LedgerError as error:
        return f"not usable: {error}"
    return None


def full_disk(folder: Path) -> tuple[int, list[str]]:
    """Lets a file grow by each number of bytes short of a line; returns how often it was full, and what was wrong."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path, wrong, full, room = folder / "full/ledger.jsonl", [], 0, 0
    create(path, partition="a", privacy=PRIVACY)
    while True:
        ledger = Ledger.open(path, partition="a", privacy=PRIVACY)
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))
        try:
            ledger.reserve("m", Release(noise_multiplier=1.0, sample_rate=PRIVACY.sample_rate, steps=1))
        except LedgerError:
            full += 1
        else:
            return full, wrong
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            ledger.close()
        if path.read_bytes() != before:
            wrong.append(f"with room for {room} bytes: the file changed")
        room += 3


def main(folder: Path) -> None:
    anchor = folder / "before/anchors/a.json"
    create(folder / "before/ledger.jsonl", partition="a", privacy=PRIVACY)
    ledger = Ledger.open(folder / "before/ledger.jsonl", partition="a", privacy=PRIVACY, anchor=anchor)
    for number in range(6):  # more than the children take: their epsilons are in the cache when they are forked
        ledger.account.epsilon_with(
            Release(noise_multiplier=1.0, sample_rate=PRIVACY.sample_rate, steps=11 * number + 11)
        )
    ledger.commit(ledger.reserve("old", ROUND))
    ledger.close()
    walks: dict[str, dict[str, list[str]]] = {}
    wrong: list[str] = []
    for life in (starting, serving):
        shutil.rmtree(folder / "here", ignore_errors=True)
        before = folder / "before/anchors"
        if life is starting:
            shutil.move(before, folder / "aside")  # a partition with an anchor was used before
        for kind in KINDS:
            names, found = walk(folder, life, kind)
            walks.setdefault(life.__name__, {})[kind] = names
            wrong += found
        if life is starting:
            shutil.move(folder / "aside", before)
    full, found = full_disk(folder)
    print(json.dumps({"walks": walks, "full": full, "wrong": wrong + found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
