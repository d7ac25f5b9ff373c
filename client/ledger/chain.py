"""An append-only file of JSON lines, each carrying the hash of the one before: what the ledger is written on.

Invariant: after any crash, kill or full disk the file holds all acknowledged lines and is whole, or it is refused.
A line is `{"sequence", "time", "kind", ..., "prev", "hash"}`: `hash` covers the rest of the line and `prev` is the
hash of the line before, so an edited, dropped, swapped or torn line is found. The chain is not keyed: who can rewrite
the whole file can rewrite the chain, which is what anchors outside the file are for.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from common.files import sync_directory

GENESIS = "0" * 64

_FALLOC_FL_KEEP_SIZE = 1
_libc = ctypes.CDLL(None, use_errno=True)


class ChainError(Exception):
    """The file cannot be trusted, read or written. One line, naming the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the file."""

    sequence: int  # 1, 2, 3, ... without a gap
    time: str  # UTC, for people; nothing depends on it
    kind: str
    body: dict[str, Any]
    prev: str
    hash: str

    def encode(self) -> bytes:
        return _encode({**self._content(), "hash": self.hash}) + b"\n"

    def _content(self) -> dict[str, Any]:
        head = {"sequence": self.sequence, "time": self.time, "kind": self.kind}
        return {**head, **self.body, "prev": self.prev}

    @classmethod
    def after(cls, last: "Entry | None", kind: str, body: dict[str, Any]) -> Self:
        """The next entry of a chain that ends with `last`."""
        entry = cls(
            sequence=last.sequence + 1 if last else 1,
            time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            kind=kind,
            body=body,
            prev=last.hash if last else GENESIS,
            hash="",
        )
        return cls(
            sequence=entry.sequence, time=entry.time, kind=kind, body=body, prev=entry.prev,
            hash=hashlib.sha256(_encode(entry._content())).hexdigest(),
        )  # fmt: skip


def decode(raw: bytes, source: Path) -> list[Entry]:
    """All entries of a file's bytes, verified from the first to the last.

    Raises:
        ChainError: naming the first line that is torn, edited, dropped or out of order.
    """
    if not raw:
        raise ChainError(f"{source}: empty")
    lines = raw.split(b"\n")
    if lines.pop() != b"":
        raise ChainError(f"{source}: line {len(lines) + 1}: torn (its end is missing)")
    entries: list[Entry] = []
    prev = GENESIS
    for number, line in enumerate(lines, start=1):
        entry = _decode_line(line, number, source)
        if entry.sequence != number or entry.prev != prev:
            raise ChainError(f"{source}: line {number}: does not follow the line before (dropped, swapped or edited)")
        prev = entry.hash
        entries.append(entry)
    return entries


def _decode_line(line: bytes, number: int, source: Path) -> Entry:
    try:
        content = json.loads(line)
        claimed = content.pop("hash")
        entry = Entry(
            sequence=content.pop("sequence"), time=content.pop("time"), kind=content.pop("kind"),
            prev=content.pop("prev"), body=content, hash=claimed,
        )  # fmt: skip
        encoded, digest = entry.encode(), hashlib.sha256(_encode(entry._content())).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ChainError(f"{source}: line {number}: not an entry") from None
    # The exact bytes count, not only their meaning: there is one way to write an entry.
    if encoded != line + b"\n" or claimed != digest:
        raise ChainError(f"{source}: line {number}: edited (its hash does not fit)")
    return entry


def read(path: Path) -> list[Entry]:
    """All entries of the file at `path`, verified."""
    try:
        raw = path.read_bytes()
        if not raw.endswith(b"\n"):  # torn, or met while its writer is in the middle of a line
            time.sleep(0.05)
            raw = path.read_bytes()
    except OSError as error:
        raise ChainError(f"{path}: {error.strerror}") from error
    return decode(raw, path)


def create(path: Path, kind: str, body: dict[str, Any]) -> None:
    """A new file with one entry. Appears whole or not at all; an existing file is never replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, Entry.after(None, kind, body).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(temporary, path)
        sync_directory(path.parent)
    except FileExistsError:
        raise ChainError(f"{path}: exists already (a ledger is created once and never replaced)") from None
    except OSError as error:
        raise ChainError(f"{path}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # what is left behind is in nobody's way
            temporary.unlink(missing_ok=True)


class Chain:
    """The one writer of a file: holds its lock from `open` to `close`, and notices when somebody else wrote."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self.entries = decode(self._content(), path)
        self._seen = self._stamp()

    @classmethod
    def open(cls, path: Path) -> Self:
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise ChainError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(path, fd)
        except BlockingIOError:
            os.close(fd)
            raise ChainError(f"{path}: another client holds it") from None
        except OSError as error:
            os.close(fd)
            raise ChainError(f"{path}: {error.strerror}") from error
        except ChainError:
            os.close(fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def check(self) -> None:
        """Raises ChainError unless the file at `path` is still what this writer left there."""
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                # A changed time alone is harmless: what counts is the content.
                if decode(self._content(), self.path)[-1].hash != self.entries[-1].hash:
                    raise ChainError(f"{self.path}: changed by another writer")
                self._seen = stamp
        except OSError as error:
            raise ChainError(f"{self.path}: {error.strerror}") from error

    def append(self, kind: str, body: dict[str, Any]) -> Entry:
        """Writes one entry and returns when it is on the disk. After an error nobody knows if it is."""
        self.check()
        entry = Entry.after(self.entries[-1], kind, body)
        line = entry.encode()
        size = os.fstat(self._fd).st_size
        try:
            _reserve_space(self._fd, size, len(line))
            try:
                _write_all(self._fd, line)
            except OSError:
                os.ftruncate(self._fd, size)
                raise
            os.fsync(self._fd)
            before, self._seen = self._seen, self._stamp()
        except OSError as error:
            raise ChainError(f"{self.path}: {error.strerror}") from error
        if self._seen[0] != before[0] + len(line):  # it came between the check and the write
            raise ChainError(f"{self.path}: changed by another writer")
        self.entries.append(entry)
        return entry

    def _content(self) -> bytes:
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def _stamp(self) -> tuple[int, ...]:
        mine, there = os.fstat(self._fd), os.stat(self.path)
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise ChainError(f"{self.path}: replaced by another file")
        return mine.st_size, mine.st_mtime_ns


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def _write_all(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _reserve_space(fd: int, offset: int, length: int) -> None:
    """Claims the disk blocks first, so that a full disk is met before a byte is written and not in mid-line."""
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(length)) == -1:
        error = ctypes.get_errno()
        if error not in (errno.EOPNOTSUPP, errno.ENOSYS):  # NFS and others cannot: a short write is cut off again
            raise OSError(error, os.strerror(error))
