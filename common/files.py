"""Files that are whole or absent, whenever the process or the machine stops, and locks that end with their holder."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.05


class LockedError(OSError):
    """Another process holds the lock."""


def replace(path: Path, content: bytes) -> None:
    """Make `content` the file at `path`, durably: a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def hold(path: Path, *, patience: float = 0) -> Iterator[None]:
    """Hold the lock on `path`, waiting up to `patience` seconds for it. The kernel drops it with its holder.

    Raises LockedError.
    """
    deadline = time.monotonic() + patience
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by children
    try:
        while not _take(descriptor):
            if time.monotonic() >= deadline:
                raise LockedError(f"{path}: held by another process")
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock. Takes and drops it, so `hold` needs some patience beside this."""
    try:
        with hold(path):
            return False
    except LockedError:
        return True


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
