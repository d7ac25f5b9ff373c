"""The ServerApp's output, on the supervisor's standard error: SuperExec starts it with none.

It goes through a file, which outlives the ServerApp and so has its last words too.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def passing_on(state: Path) -> Iterator[Callable[[], None]]:
    """A function that writes what is new since it was last called, and is called once more in the end."""
    with _path(state).open("w+b") as file:

        def pump() -> None:
            if new := file.read():
                sys.stderr.buffer.write(new)
                sys.stderr.flush()

        try:
            yield pump
        finally:
            pump()


def redirect(state: Path) -> None:
    """Send this process' standard output and error into the file."""
    descriptor = os.open(_path(state), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _path(state: Path) -> Path:
    return state / "serverapp.log"
