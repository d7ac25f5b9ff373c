"""Processes that do not outlive what started them: not even when it is killed outright. Linux only.

`python -m common.process PARENT COMMAND...` becomes COMMAND, which the kernel ends with the process PARENT. That is
set in a process of its own rather than between fork and exec, where a parent with threads may do almost nothing safely.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36


def tethered(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` for no longer than this process, or to be exact its calling thread."""
    return [sys.executable, "-m", "common.process", str(os.getpid()), *command]


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends. Useless if it has ended already."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that `children` finds them all."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def children() -> Iterator[int]:
    """The ids of this process' children, ended ones that nobody waited for among them."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()  # the name before it may hold spaces
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            yield int(entry.parent.name)


def kill_children(*, seconds: float) -> list[int]:
    """End this process' children and then, where it adopts orphans, what they leave; those alive after `seconds`."""
    deadline = time.monotonic() + seconds
    while left := list(children()):  # each one killed may leave us its own
        if time.monotonic() > deadline:
            return left
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return []


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def main(arguments: Sequence[str]) -> None:
    parent, command = int(arguments[0]), list(arguments[1:])
    die_with_parent()
    if os.getppid() == parent:  # otherwise it ended before we asked
        os.execvp(command[0], command)  # noqa: S606 (a shell is what it avoids)


if __name__ == "__main__":
    main(sys.argv[1:])
