"""Ledgers for tests: the terms of one owner, and a file on which some rounds were charged."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.accounting import Release
from client.ledger import Ledger, create
from common.config import Privacy

TERMS = {
    "epsilon": 4.0, "delta": 1e-5, "noise_multiplier": 1.5, "max_grad_norm": 1.0, "batch_size": 64, "records": 700,
    "max_steps_per_round": 11, "accounting": "adaptive",
}  # fmt: skip

# In memory where it can be: a kill loses no page that was written, so a disk would only make a long test slow.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


def terms(**changes: object) -> Privacy:
    return Privacy(**{**TERMS, **changes})


def release(steps: int = 11, privacy: Privacy | None = None) -> Release:
    privacy = privacy or terms()
    return Release(noise_multiplier=privacy.noise_multiplier, sample_rate=privacy.sample_rate, steps=steps)


@contextmanager
def opened(path: Path, anchor: Path | None = None, **changes: object) -> Iterator[Ledger]:
    ledger = Ledger.open(path, partition="a", privacy=terms(**changes), anchor=anchor)
    try:
        yield ledger
    finally:
        ledger.close()


def used(folder: Path) -> Path:
    """A ledger with two committed rounds and one that was never committed: seven lines."""
    path = folder / "a/ledger.jsonl"
    create(path, partition="a", privacy=terms())
    with opened(path) as ledger:
        for message in ("m1", "m2"):
            ledger.commit(ledger.reserve(message, release()))
        ledger.reserve("m3", release())
    return path


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own at `folder`; skips the test where this user may not have one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
