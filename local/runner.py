"""One server and one client as child processes. However this process ends, nothing that it started outlives it.

The invariant holds for kill -9 as well: the children are tethered to this process, and theirs to them. Orphans of a
child that was killed become ours and are ended with the rest.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from common.process import adopt_orphans, kill_children, tethered
from local.errors import LocalError
from local.preparation import FEDERATION, POLICY, STATE
from local.progress import Progress

LOGS = STATE / "logs"
_END_SECONDS = 20.0  # for the programs to end in order; what a client trains then stays spent in its ledger
_POLL_SECONDS = 0.1
_LOG_TAIL = 65536  # bytes
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|^python -m \w+: |^[\w.]*(Error|Exception)\b")
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asks for the end. Not an Exception, so that nothing on the way takes it for a failure."""


def catch_signals() -> None:
    """From now on a signal that asks for the end raises `Stopped`, once."""
    for number in _STOPS:
        signal.signal(number, _stop)


def run(progress: Progress) -> None:
    """Take the prepared run to its end.

    Raises:
        LocalError: the server or the client ended as it should not.
        Stopped: by a signal.
    """
    with Programs(LOGS) as programs:
        server = programs.start("server", "--config", str(FEDERATION))
        client = programs.start("client", "--policy", str(POLICY))
        while server.poll() is None:
            if client.poll() is not None:
                raise _ended("client", client)
            progress.update()
            time.sleep(_POLL_SECONDS)
        progress.update()
    if server.returncode != 0:
        raise _ended("server", server)


class Programs:
    """A context: left, no process that was started in it is alive."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        adopt_orphans()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ignore_signals()  # nothing may interrupt the ending of processes
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(_POLL_SECONDS)
        for process in self._processes:
            process.kill()
            process.wait()
        kill_children(seconds=_END_SECONDS)

    def start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """`python -m module`, in a session of its own so that Ctrl-C reaches only us; its words go to a log."""
        with (self._logs / f"{module}.log").open("wb") as log:
            process = subprocess.Popen(
                tethered([sys.executable, "-m", module, *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process


def _ended(module: str, process: subprocess.Popen[bytes]) -> LocalError:
    code = process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        return LocalError(f"the {module} was killed by {name} (the same command goes on after the last round)", code=1)
    line = last_error(LOGS / f"{module}.log")
    return LocalError(f"the {module} ended: {line}", code=code if module == "server" else 1)


def last_error(log: Path) -> str:
    """The last line of a log that reads like an error, or else its last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        text = _COLOUR.sub("", file.read().decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line)]
    return _last(errors) or _last(lines) or f"{log} says nothing"


def _last(lines: Sequence[str]) -> str:
    return lines[-1] if lines else ""


def _ignore_signals() -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    _ignore_signals()
    raise Stopped(number)
