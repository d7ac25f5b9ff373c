"""The federation in containers, as compose starts it from a copy of the checkout, and what tests do to it."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client import ledger
from common import certificates
from tests.containers import machine
from tests.federation import ROOT, wait_for

PROJECT = "fedeps-test"
ADDRESS = "127.0.0.2"  # a loopback address that a federation on the same machine does not use
PROMETHEUS = "fedeps-test/prometheus:2.42"
SERVICES = ("server", "client", "prometheus")  # Grafana's image comes from a registry
HOST_CA = Path("/etc/ssl/certs/ca-certificates.crt")
CANARY = machine.CACHE / "canary.crt"

_SETTINGS = {
    "COMPOSE_FILE": "compose.yaml",  # without the GPU
    "COMPOSE_PROJECT_NAME": PROJECT,
    "BASE_IMAGE": machine.BASE,
    "PROMETHEUS_IMAGE": PROMETHEUS,
    "FEDEPS_BIND": ADDRESS,
}


def copy_checkout(folder: Path) -> None:
    """What git would commit, and where a company puts its proxy's CA this machine's, and one that no other has."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (source := ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    if not CANARY.exists():  # made once: another one would rebuild all layers
        CANARY.write_bytes(certificates.authority(certificates.new_key(), days=3650))
    for authority in (HOST_CA, CANARY):
        shutil.copyfile(authority, folder / "docker/ca" / authority.with_suffix(".crt").name)


class Stack:
    """Compose in a folder. Settings are what a user puts before the command: `CLIENTS=3 docker compose up`."""

    def __init__(self, folder: Path, docker: dict[str, str], **settings: str) -> None:
        self.folder = folder
        self._environment = {**docker, **_SETTINGS, **settings}
        self._volumes: dict[str, Path] = {}

    def compose(self, *arguments: str) -> str:
        """Its output; raises with its words if it fails."""
        return self._run("docker-compose", *arguments)

    def docker(self, *arguments: str) -> str:
        return self._run("docker", *arguments)

    def build(self, stage: str) -> None:
        """A stage that does not ship, from the same layers as the images."""
        index = f"PIP_INDEX_URL={self._environment.get('PIP_INDEX_URL', '')}"
        arguments = ("--build-arg", f"BASE_IMAGE={machine.BASE}", "--build-arg", index)
        self.docker(
            "build", "--file", "docker/Dockerfile", "--target", stage, "--tag", f"{PROJECT}/{stage}", *arguments, "."
        )

    def up(self) -> None:
        self.compose("up", "--detach", "--no-build", *SERVICES)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What `docker inspect` says about each, ended ones too."""
        labels = (f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}")
        ids = self.docker("ps", "--all", "--quiet", *(f"--filter=label={label}" for label in labels)).split()
        return self.inspect(*ids) if ids else []

    def inspect(self, *names: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", *names))
        return found

    def logs(self, container: str) -> str:
        command = ["docker", "logs", container]
        return subprocess.run(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout

    def ask(self, container: str, address: str, path: str) -> tuple[int, str]:
        """The exit code and answer of the health check's own program, in the container."""
        command = ["docker", "exec", container, "python", "-m", "common.http", address, path]
        ended = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        return ended.returncode, ended.stdout

    def volume(self, name: str) -> Path:
        """Where its files lie on this machine: the same place whenever it is made again."""
        if name not in self._volumes:
            shown = self.docker("volume", "inspect", "--format", "{{.Mountpoint}}", f"{PROJECT}_{name}")
            self._volumes[name] = Path(shown.strip())
        return self._volumes[name]

    def ledgers(self) -> dict[str, Path]:
        """By partition."""
        return {path.parent.name: path for path in sorted(self.volume("ledgers").glob("*/ledger.jsonl"))}

    def spent(self, *partitions: str) -> dict[str, float]:
        """Epsilon by partition, as the ledgers have it; of all partitions, if none is named."""
        paths = self.ledgers()
        return {name: ledger.read(paths[name]).epsilon_spent for name in partitions or paths}

    def runs(self) -> list[str]:
        """The oldest first."""
        folders = (path.parent for path in self.volume("runs").glob("*/rounds.jsonl"))
        return sorted(folder.name for folder in folders if not folder.is_symlink())  # one is called latest

    def rounds(self, run: str = "latest") -> list[dict[str, Any]]:
        """What `rounds.jsonl` says about each completed round."""
        path = self.volume("runs") / run / "rounds.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{ADDRESS}:9090/api/v1/query?{query}", timeout=30) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return result

    def _run(self, *command: str) -> str:
        ended = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        if ended.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {ended.stdout}{ended.stderr}")
        return ended.stdout


def wait_slowly(condition: Callable[[], Any], what: str, seconds: float) -> Any:
    """`wait_for`, where each look is a process or more."""

    def look() -> Any:
        time.sleep(0.5)
        return condition()

    return wait_for(look, what, seconds)


def kill(container: dict[str, Any]) -> None:
    """End a container as a power cut would: by its first process, not by Docker, which would not start it again."""
    os.kill(container["State"]["Pid"], signal.SIGKILL)
