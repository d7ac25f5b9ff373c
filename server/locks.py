"""Who is alive, told by `flock`: the kernel drops a lock with its holder, however that ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.05


class LockedError(OSError):
    """Another process holds the lock."""


@contextmanager
def hold(path: Path, *, patience: float = 0) -> Iterator[None]:
    """Hold the lock on `path`, waiting up to `patience` seconds for it. Raises LockedError."""
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
