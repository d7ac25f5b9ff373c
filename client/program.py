"""Where a compiled step lies. The host passes it on to workers, so this imports no torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Clipped sums of a model, compiled by `client.compiler` for `rows` records at a time on one kind of device."""

    path: Path  # of a shared library, in a folder that is this client's alone: who can write it runs code here
    rows: int
    device: str  # cpu, cuda
