"""`python -m server.tether PARENT COMMAND...` becomes COMMAND, which then cannot outlive the process PARENT.

The kernel ends it even when PARENT is killed outright. Set in a process of its own rather than between fork and
exec, where a parent with threads may do almost nothing safely. Linux only.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36


def tethered(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` for no longer than this process, or to be exact its calling thread."""
    return [sys.executable, "-m", "server.tether", str(os.getpid()), *command]


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
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
