"""What the partitions of one process are all sent, pulled once: a model, in parts that are named by their content.

A name that the server gave is a hash, and only a content of that hash is kept under it: a server cannot make one
partition train on what another was sent under a false name.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_SECONDS = 5.0  # for another partition that pulls the same: a server that stalls one does not stall all
KEEP_SECONDS = 60.0  # without use: between rounds no memory is held


class Objects:
    """Contents by their SHA-256, the least used forgotten first. For use by several threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # content, when it was last used
        self._bytes = 0
        self._pulling: dict[str, tuple[threading.Lock, list[int]]] = {}  # with how many hold or wait for it

    def get(self, name: str) -> bytes | None:
        """The content of this hash, if it is here."""
        with self._lock:
            if (found := self._kept.pop(name, None)) is None:
                return None
            self._kept[name] = found[0], time.monotonic()
            return found[0]

    def keep(self, name: str, content: bytes) -> None:
        """Keeps `content` if `name` is its hash and it fits."""
        if len(content) > self._most or hashlib.sha256(content).hexdigest() != name:
            return
        with self._lock:
            if name not in self._kept:
                self._kept[name] = content, time.monotonic()
                self._bytes += len(content)
            while self._bytes > self._most:
                self._forget_oldest()

    def forget_unused(self) -> None:
        """Called now and then."""
        with self._lock:
            while self._kept and next(iter(self._kept.values()))[1] < time.monotonic() - KEEP_SECONDS:
                self._forget_oldest()

    @contextmanager
    def pulled_once(self, name: str) -> Iterator[None]:
        """While one thread is inside with a name, others wait for it, but not for long."""
        if not self._most:
            yield
            return
        with self._lock:
            lock, users = self._pulling.setdefault(name, (threading.Lock(), [0]))
            users[0] += 1
        mine = lock.acquire(timeout=WAIT_SECONDS)
        try:
            yield
        finally:
            if mine:
                lock.release()
            with self._lock:
                users[0] -= 1
                if not users[0]:
                    del self._pulling[name]

    def _forget_oldest(self) -> None:
        _, (content, _) = self._kept.popitem(last=False)
        self._bytes -= len(content)
