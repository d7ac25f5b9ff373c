"""Programs that run in a temporary directory and do not outlive the block that started them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from common.process import adopt_orphans, kill_children, tethered

_ROOT = Path(__file__).parent.parent
_LOOPBACK = "127.0.0.1"
_END_SECONDS = 20.0
_POLL_SECONDS = 0.02


class BenchmarkError(RuntimeError):
    """What was to be measured did not work. One line, and what the programs said last."""


class Unavailable(BenchmarkError):
    """What the benchmark is about is not on this machine. The others go on."""


class Programs:
    """A context: left, no process that was started in it is alive, and its directory is gone."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        adopt_orphans()
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(TemporaryDirectory(prefix="benchmark-")))
            self._clean = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._clean:
            for process in self._processes.values():
                process.terminate()
            deadline = time.monotonic() + _END_SECONDS
            for process in self._processes.values():
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if left := kill_children(seconds=_END_SECONDS):
                raise BenchmarkError(f"processes {left} outlive {', '.join(self._processes)}")

    def start(self, name: str, *command: str) -> int:
        """Starts `command` in the directory and returns its process id; its words go to `name`.log."""
        with (self.directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                tethered(command),
                cwd=self.directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        return process.pid

    def call(self, name: str, *command: str, text: str = "", seconds: float = 120.0) -> None:
        """Runs `command` to its end with `text` as its input. Raises BenchmarkError if it fails."""
        ended = subprocess.run(
            command, cwd=self.directory, env=self._environment(), input=text, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
        if ended.returncode != 0:
            raise BenchmarkError(f"{name} ended with {ended.returncode}\n{ended.stdout}{ended.stderr}")

    def wait(self, name: str, *, seconds: float) -> None:
        """Waits for the end of a program. Raises BenchmarkError unless it is a good one."""
        try:
            code = self._processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise self.problem(f"{name} has not ended after {seconds:.0f} s") from None
        if code != 0:
            raise self.problem(f"{name} ended with {code}")

    def wait_until(self, condition: Callable[[], bool], what: str, *, seconds: float) -> None:
        """Waits for `condition`. Raises BenchmarkError if a program ends badly before, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            for name, process in self._processes.items():
                if process.poll() not in (None, 0):
                    raise self.problem(f"{name} ended with {process.returncode}")
            if time.monotonic() > deadline:
                raise self.problem(f"{what}: not after {seconds:.0f} s")
            time.sleep(_POLL_SECONDS)

    def lines(self, path: Path, count: int, *, seconds: float) -> Iterator[int]:
        """1 to `count`, each as soon as the file at `path` has so many lines; `seconds` are for one more of them."""
        for number in range(1, count + 1):
            self.wait_until(lambda: _lines(path) >= number, f"line {number} of {path.name}", seconds=seconds)  # noqa: B023
            yield number

    def problem(self, line: str) -> BenchmarkError:
        """An error that shows the end of every program's log."""
        logs = sorted(self.directory.glob("*.log"))
        tails = ["\n".join(path.read_text(errors="replace").splitlines()[-10:]) for path in logs]
        said = [f"-- {path.stem}:\n{tail}" for path, tail in zip(logs, tails, strict=True)]
        return BenchmarkError("\n".join([line, *said]))

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": str(_ROOT),
            "FLWR_HOME": str(self.directory / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "no_proxy": _LOOPBACK,  # gRPC sends even loopback traffic to a proxy otherwise
            "NO_PROXY": _LOOPBACK,
        }


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def free_port() -> int:
    """A port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


def free_address() -> str:
    return f"{_LOOPBACK}:{free_port()}"


def listens(port: int) -> bool:
    """Whether something accepts connections on this port of loopback."""
    try:
        socket.create_connection((_LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True
