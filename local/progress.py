"""Follows a run by the files that the server writes, and shows it. Nothing is counted here."""

import itertools
import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from common.config import Federation, Policy
from local import display
from server import history

_TICKS = "|/-\\"


class Progress:
    """One run on a text stream: a line per round, and on a terminal a line that moves meanwhile."""

    def __init__(self, stream: TextIO, federation: Federation, policy: Policy) -> None:
        self._stream = stream
        self._moves = stream.isatty()
        self._ticks = itertools.cycle(_TICKS)
        self._rounds = federation.rounds
        self._runs, self._state = federation.server.runs, federation.server.state
        self._clients, self._wanted = len(policy.partitions), federation.min_clients
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._old = _stamp(self._state)  # the status of an earlier run
        self._size = 0
        self._shown: dict[int, dict[str, Any]] = {}
        self._say(display.title(federation, policy))

    def update(self) -> None:
        """Show what is new."""
        status = self._status()
        if status:
            self._show_rounds(status)
        if self._moves:
            seconds = time.monotonic() - self._clock
            self._stream.write(f"\r\x1b[K{next(self._ticks)} {self._doing(status)}, {seconds:.0f} s")
            self._stream.flush()

    def clear(self) -> None:
        """Take away the line that moves."""
        if self._moves:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def finish(self) -> None:
        """Show how the run ended: a table, the report, and what to do about budgets that are spent."""
        directory = self._runs / self._status()["run"]
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        self._say(f"\n{display.table(summary)}\n")
        self._say(display.end(summary, self._rounds))
        self._say(f"report: {directory / 'report.html'}")
        if spent := display.exhausted(summary):
            self._say(spent)

    def _status(self) -> dict[str, Any]:
        return history.read_status(self._state) if _stamp(self._state) != self._old else {}

    def _show_rounds(self, status: dict[str, Any]) -> None:
        path = self._runs / status["run"] / "rounds.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size == self._size:
            return
        self._size = size
        before = 0
        for line in history.rounds(path.parent):
            if self._shown.get(line["round"]) == line:
                continue
            self._shown[line["round"]] = line
            if datetime.fromisoformat(line["started"]) < self._started:
                before = line["round"]
            else:  # also a round that was shown, and after a crash had to be done again
                self._say(display.round_text(line, status["rounds"], shutil.get_terminal_size().columns))
        if before:
            self._say(f"goes on after round {before} of run {status['run']}")

    def _doing(self, status: dict[str, Any]) -> str:
        if not status:
            return "starting the server and the clients"
        connected = f"{len(status['connected'])} of {self._clients} clients connected"
        if len(status["connected"]) < self._wanted and not self._shown:
            return f"waiting for clients, {connected}"
        return f"training round {status['round']} of {status['rounds']}, {connected}"

    def _say(self, text: str) -> None:
        self.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()


def _stamp(state: Path) -> int:
    """Differs whenever the status was written anew."""
    path = state / "status.json"
    return path.stat().st_mtime_ns if path.exists() else 0
