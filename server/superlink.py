"""One SuperLink and everything it starts: up with the registered partitions and the run, down without a trace.

Its state is in memory, and worth nothing to us (server.checkpoint holds what counts), so that it is ended by SIGKILL,
and a crash of any part of it is answered by starting all of it anew.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from common.config import ServerSettings
from common.files import replace
from common.process import kill_children, tethered
from server.outcome import CrashError
from server.preflight import LOOPBACK, registered

_LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).parent.parent
_BUNDLE = Path(__file__).parent / "bundle"
_START_SECONDS = 120.0
_CONTROL_SECONDS = 600.0
_END_SECONDS = 10.0
_POLL_SECONDS = 0.05


class SuperLink:
    """A context: entered, SuperLink listens; left, no process of it is alive."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._home = (settings.state / "flwr").absolute()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._home.mkdir(parents=True, exist_ok=True)
        replace(self._home / "config.toml", self._connection().encode())
        try:
            self._superlink = self._start(*self._command(), stdin=subprocess.DEVNULL)
            # Loads Flower's command line while SuperLink starts.
            self._control = self._start(sys.executable, "-m", "server.control", stdin=subprocess.PIPE)
            self._wait_until_listening()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def submit(self, federation: Path) -> None:
        """Register every partition under its name, then start the run that reads `federation`.

        Raises CrashError, with Flower's own words, if it takes either one badly.
        """
        keys = registered(self._settings)
        commands = [["supernode", "register", str(path), "--name", name] for name, path in keys.items()]
        setting = f"federation={json.dumps(str(federation.absolute()))}"
        commands.append(["run", str(_BUNDLE), "--run-config", setting])
        started = time.monotonic()
        try:
            output, _ = self._control.communicate(json.dumps(commands).encode(), timeout=_CONTROL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CrashError(f"SuperLink took over {_CONTROL_SECONDS:.0f} s to register the keys") from error
        if self._control.returncode != 0:
            raise CrashError(" ".join(output.decode(errors="replace").splitlines()[-1:]) or "flwr was killed")
        seconds = time.monotonic() - started
        _LOG.info("%d partitions registered and the run submitted in %.1f s", len(keys), seconds)

    def check(self) -> None:
        """Raises CrashError if SuperLink has ended."""
        if self._superlink.poll() is not None:
            raise CrashError(f"SuperLink ended with {self._superlink.returncode}")

    def _start(self, *command: str, stdin: int) -> subprocess.Popen[bytes]:
        control = stdin == subprocess.PIPE  # whose words matter only when it fails
        process = subprocess.Popen(
            tethered(command),
            stdin=stdin,
            stdout=subprocess.PIPE if control else None,
            stderr=subprocess.STDOUT if control else None,
            env=self._environment(),
            start_new_session=True,  # Ctrl-C reaches the supervisor only, which then ends this in order
        )
        self._processes.append(process)
        return process

    def _command(self) -> list[str]:
        settings = self._settings
        return [
            "flower-superlink",
            *("--ssl-certfile", str(settings.certificate)),
            *("--ssl-keyfile", str(settings.certificate_key)),
            *("--ssl-ca-certfile", str(settings.ca_certificate)),
            "--enable-supernode-auth",
            *("--isolation", "subprocess"),
            *("--host", LOOPBACK, "--port", str(settings.control_port)),
            *("--fleet-api-address", settings.fleet_address),
        ]

    def _connection(self) -> str:
        """How Flower's command line finds SuperLink. A JSON string is a TOML string too."""
        address = f"{LOOPBACK}:{self._settings.control_port}"
        authority = str(self._settings.ca_certificate.absolute())
        return (
            '[superlink]\ndefault = "fedeps"\n\n[superlink.fedeps]\n'
            f"address = {json.dumps(address)}\nroot-certificates = {json.dumps(authority)}\n"
        )

    def _environment(self) -> dict[str, str]:
        programs = str(Path(sys.executable).parent)  # SuperLink starts its helpers by bare name
        inherited = os.environ
        direct = ",".join(filter(None, [inherited.get("no_proxy"), "localhost", LOOPBACK, "::1"]))
        return {
            **inherited,
            "PATH": os.pathsep.join(filter(None, [programs, inherited.get("PATH")])),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), inherited.get("PYTHONPATH")])),
            "no_proxy": direct,  # gRPC and httpx would otherwise send even loopback traffic to a proxy
            "NO_PROXY": direct,
            "FLWR_HOME": str(self._home),
            "FLWR_LOG_LEVEL": "WARNING",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        }

    def _wait_until_listening(self) -> None:
        """Its HTTP APIs are the last to come up, after the Fleet API."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self.check()
            try:
                socket.create_connection((LOOPBACK, self._settings.control_port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise CrashError(f"SuperLink does not listen after {_START_SECONDS:.0f} s") from None
                time.sleep(_POLL_SECONDS)

    def _end(self) -> None:
        """Kill what we started and then, as they become ours, what those started."""
        for process in self._processes:
            process.kill()
            process.communicate()
        if left := kill_children(seconds=_END_SECONDS):
            raise CrashError(f"processes {left} outlive SuperLink")
