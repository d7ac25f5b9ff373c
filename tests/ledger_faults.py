"""Ends a process, or fails its calls, at each system call that a ledger makes: `python -m tests.ledger_faults FOLDER`.

A program of its own, since it forks for each point, which only a process with one thread may. It prints JSON: the calls
that it walked through, and what was found wrong.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.accounting import Release
from client.ledger import Ledger, LedgerError, create, read
from common.config import Privacy
from tests import syscalls

PRIVACY = Privacy(
    epsilon=8.0, delta=1e-5, noise_multiplier=1.0, max_grad_norm=1.0, batch_size=64, records=700,
    max_steps_per_round=11, accounting="adaptive",
)  # fmt: skip
RAISED = PRIVACY.model_copy(update={"epsilon": 9.0})
ROUND = Release(noise_multiplier=1.0, sample_rate=PRIVACY.sample_rate, steps=11)
ENOUGH = 20  # findings: a broken ledger need not be walked to its end


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
            ledger.commit(reservation, data="key:data")  # the first time it looks at the other ledgers beside it
            said("commit")
    except LedgerError as error:
        if "what the others have" in str(error):  # this ledger's own file has met no error
            raise
        try:
            ledger.reserve("after an error", ROUND)
        except LedgerError:
            raise
        said("charged after an error")


def walk(folder: Path, life: Callable[..., None]) -> tuple[list[str], int, list[str]]:
    """Runs `life` in children, one for each fault of each call that it makes.

    Returns its calls, the number of faults, and what was wrong.
    """
    calls, _, problem = run(folder, life)
    wrong = [f"{life.__name__}, without a fault: {problem}"] if problem else []
    faults = 0
    for at, call in enumerate(calls, start=1):
        for kind in syscalls.kinds(call):
            faults += 1
            names, said, problem = run(folder, life, kind, at)
            if names[:at] != calls[:at]:
                problem = f"made other calls than without it: {names[:at]}"
            here = folder / "here"
            path = here / ("new/ledger.jsonl" if life is starting else "ledger.jsonl")
            problem = problem or judge(path, folder / "before/ledger.jsonl", said, kind, here / "anchors/a.json")
            if problem:
                wrong.append(f"{life.__name__}, {kind} call {at}, {call}: {problem}")
        if len(wrong) > ENOUGH:
            break
    return calls, faults, wrong


def run(
    folder: Path, life: Callable[..., None], kind: str = "", at: int = 0
) -> tuple[list[str], list[str], str | None]:
    """What a child called and said, and the error that it should not have raised."""
    here = folder / "here"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(folder / "before", here)
    ours, theirs = os.pipe()

    def child() -> None:
        problem = None
        try:
            life(here, lambda word: os.write(theirs, f"{word}\n".encode()))
        except LedgerError as error:
            problem = "several lines" if "\n" in str(error) else None
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        os.write(theirs, f"ended\n{json.dumps(problem)}\n".encode())

    names = syscalls.trace(child, ignore=theirs, kind=kind, at=at)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        said = pipe.read().splitlines()
    return names, said, json.loads(said.pop()) if "ended" in said else None


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
    walks: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for life in (starting, serving):
        before = folder / "before/anchors"
        if life is starting:
            shutil.move(before, folder / "aside")  # a partition with an anchor was used before
        calls, faults, found = walk(folder, life)
        walks[life.__name__] = {"calls": calls, "faults": faults}
        wrong += found
        if life is starting:
            shutil.move(folder / "aside", before)
    full, found = full_disk(folder)
    print(json.dumps({"walks": walks, "full": full, "wrong": wrong + found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
