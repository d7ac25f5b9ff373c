"""One data set, one budget: which data the owner's other ledgers were charged for, under whatever partition name.

Invariant: between two ledgers of one state directory, of all threads and processes, one at a time looks at what the
others have and writes what it has itself. `<state>/<partition>/ledger.jsonl` is where an owner's ledgers lie.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import hold

LOCK = ".data.lock"
_PATIENCE_SECONDS = 30.0


class SameData(Exception):
    """Another ledger was charged for this data, or it cannot be known. One line, for the owner's eyes only."""


@contextmanager
def claim(path: Path, data: str) -> Iterator[None]:
    """For the time in which the ledger at `path` writes that it was charged for `data`: no other one may.

    `data` is a fingerprint, `<key's name>:<digest>`. Raises SameData, OSError.
    """
    state = path.parent.parent
    with hold(state / LOCK, patience=_PATIENCE_SECONDS):
        for folder in sorted(state.iterdir()):  # `glob` would pass over what it may not read
            other = folder / path.name
            if folder == path.parent:
                continue
            known = set(_fingerprints(other))
            if data in known:
                raise SameData(f"{path}: its data are those of {other}, whose budget they have: no second one")
            if any(found.partition(":")[0] != data.partition(":")[0] for found in known):
                raise SameData(f"{path}: {other} knows its data by another key: restore the fingerprint.key of {state}")
        yield


def _fingerprints(path: Path) -> Iterator[str]:
    """Those in a ledger, also in one that is torn or edited: a new name is no cure for that."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in raw.split(b"\n"):
        if b'"data"' in line and isinstance(found := _field(line), str):
            yield found


def _field(line: bytes) -> Any:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry.get("data") if isinstance(entry, dict) else None
