"""What a person and a program can read of a run: `runs/<id>/`, and the server's live status.

`rounds.jsonl` has one durable line for each completed round; everything else is replaced whole.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from common.files import replace, sync_directory

Line = dict[str, Any]

_STATUS = "status.json"
_ROUNDS = "rounds.jsonl"


class History:
    """The directory of one run. Lines after `round`, of a round that never reached the checkpoint, are dropped."""

    def __init__(self, runs: Path, run: str, *, round: int) -> None:
        self.directory = runs / run
        self._rounds = self.directory / _ROUNDS
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [line for line in rounds(self.directory) if line["round"] <= round]
        replace(self._rounds, b"".join(map(_encode, lines)))
        _point(runs / "latest", run)

    def append(self, line: Line) -> None:
        """Add the line of a completed round."""
        with self._rounds.open("ab") as file:
            file.write(_encode(line))
            file.flush()
            os.fsync(file.fileno())


def rounds(directory: Path) -> list[Line]:
    """The completed rounds in a run's directory; a last line that a crash cut off is none."""
    try:
        text = (directory / _ROUNDS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_round(directory: Path) -> Line | None:
    """The last completed round in a run's directory."""
    lines = rounds(directory)
    return lines[-1] if lines else None


def completed(state: Path) -> tuple[str, int]:
    """How far the server has come: the run and its round under way."""
    status = read_status(state)
    return status.get("run", ""), status.get("round", 0)


def write_status(state: Path, status: dict[str, Any]) -> None:
    """What the server is doing now, for the exporter and the supervisor."""
    replace(state / _STATUS, json.dumps(status).encode())


def read_status(state: Path) -> dict[str, Any]:
    """The last status written, empty if there is none."""
    with contextlib.suppress(FileNotFoundError):
        content: dict[str, Any] = json.loads((state / _STATUS).read_text(encoding="utf-8"))
        return content
    return {}


def _encode(line: Line) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync_directory(link.parent)
