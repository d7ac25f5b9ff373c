"""Recognizes an owner's records under any partition name, without saying anything about them to anybody else.

The fingerprint is keyed with a secret that never leaves the owner's state: who reads a ledger but not the secret can
not even test a guess. Equal records in any order give equal fingerprints. What it does not catch: data of which one
record, one value or the type was changed, and a copy that lies with another owner, whose secret is another one.
"""

import hashlib
import hmac
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch import Tensor, uint8

from common.files import sync_directory
from common.tasks import Data

KEY = "fingerprint.key"
_KEY_BYTES = 32


def owner_key(state: Path) -> bytes:
    """The secret of the owner whose ledgers lie under `state`, made once, with mode 0600.

    Raises OSError, or ValueError for a file that is no such secret.
    """
    path = state / KEY
    if not path.exists():
        _make(path)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ValueError(f"{path}: expected {_KEY_BYTES} bytes; restore it")
    return key


def fingerprint(data: Data, key: bytes) -> str:
    """`<key's name>:<HMAC-SHA256 in hex>` of the records, whatever their order.

    Each record is its input and target: their bytes, shapes and types. The key's name tells fingerprints that can be
    compared from those that cannot, and nothing else.
    """
    terms = "|".join(f"{part.dtype}{list(part.shape[1:])}" for part in (data.inputs, data.targets))
    of_terms = hmac.digest(key, b"terms" + terms.encode(), "sha256")
    # One after the other, each with the whole record: 60 000 records of 784 bytes take a fraction of a second.
    rows = zip(_rows(data.inputs), _rows(data.targets), strict=True)
    records = sorted(hmac.digest(of_terms, row + target, "sha256") for row, target in rows)
    whole = hmac.digest(of_terms, b"".join(records), "sha256")
    return f"{hashlib.sha256(b'name' + key).hexdigest()[:8]}:{whole.hex()}"


def _rows(part: Tensor) -> Iterator[bytes]:
    """The bytes of each record's part of a tensor [n, ...]."""
    if not len(part):
        return
    flat = part.detach().cpu().reshape(len(part), -1).contiguous().view(uint8).numpy()
    yield from (row.tobytes() for row in flat)


def _make(path: Path) -> None:
    """Appears whole or not at all; of several workers that make it at once, one's stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(os.urandom(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
