"""A real federation for tests: `python -m server` and `python -m client` in a folder of their own, on free ports."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from client import ledger
from common import pki
from common.config import Policy, load

ROOT = Path(__file__).parent.parent
TASK = "digits"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Federation:
    """Configuration, keys and ledgers under `folder`; starts and ends the programs that use them."""

    def __init__(self, folder: Path, *, clients: int = 2, privacy: dict[str, Any] | None = None, **run: Any) -> None:
        self.folder = folder
        self.partitions = [f"{TASK}-{index}-of-{clients}" for index in range(clients)]
        fleet, self.control, self.client_metrics, self.server_metrics = free_ports(4)
        self.fleet = f"127.0.0.1:{fleet}"
        self.processes: list[subprocess.Popen[bytes]] = []
        records = 1437 // clients
        terms = {
            "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 4.0, "max_grad_norm": 0.5, "batch_size": 64,
            "records": records, "max_steps_per_round": 4, "accounting": "adaptive", **(privacy or {}),
        }  # fmt: skip
        self.policy_content: dict[str, Any] = {
            "task": TASK,
            "privacy": terms,
            "training": {"idle_seconds": 10.0},
            "client": {"server_address": self.fleet, "metrics_address": f"127.0.0.1:{self.client_metrics}"},
            "partitions": [{"name": name, "index": index, "of": clients} for index, name in enumerate(self.partitions)],
        }
        self.federation_content: dict[str, Any] = {
            "task": TASK, "rounds": 3, "min_clients": clients, "fit_clients": clients,
            "steps_per_round": 4, "learning_rate": 16.0, **run,
            "server": {
                "fleet_address": self.fleet, "control_port": self.control,
                "metrics_address": f"127.0.0.1:{self.server_metrics}",
            },
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.configure()
        pki.create(folder / "state/pki", partitions=self.partitions)
        for name in self.partitions:
            ledger.create(self.ledger_path(name), partition=name, privacy=self.policy.privacy)

    @property
    def policy(self) -> Policy:
        return load(Policy, self.folder / "policy.yaml")

    def configure(self) -> None:
        """Writes the contents as they are now."""
        for name in ("policy", "federation"):
            text = yaml.safe_dump(getattr(self, f"{name}_content"), sort_keys=False)
            (self.folder / f"{name}.yaml").write_text(text)

    def ledger_path(self, partition: str) -> Path:
        return self.folder / "state/clients" / partition / "ledger.jsonl"

    def account(self, partition: str) -> ledger.Account:
        return ledger.read(self.ledger_path(partition))

    def start_server(self, **environment: str) -> subprocess.Popen[bytes]:
        return self.start("server", "-m", "server", "--config", "federation.yaml", **environment)

    def start_client(self, **environment: str) -> subprocess.Popen[bytes]:
        return self.start("client", "-m", "client", "--policy", "policy.yaml", **environment)

    def start(self, log: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """A Python program in the folder, its output appended to `log`."""
        with open(self.folder / f"{log}.log", "ab") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        """Ends every process it started, and what those started: politely first, so that coverage is written."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        for process in (p for p in self.processes if p.poll() is None):
            for pid in (process.pid, *descendants(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def metrics(port: int) -> dict[tuple[str, str], float]:
    """All samples by (name, partition)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, sample.labels.get("partition", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@contextmanager
def federation(folder: Path, **options: Any) -> Iterator[Federation]:
    """A federation that is gone at the end."""
    made = Federation(folder, **options)
    try:
        yield made
    finally:
        made.stop()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """The first true value of `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
        with suppress(OSError):  # a thread that has just ended has no children; the others do
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
