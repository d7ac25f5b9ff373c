"""Flower as it comes, in a temporary directory: SuperLink and one flower-supernode per client, TLS and node keys on."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.programs import Programs, free_address, free_port, listens
from common import pki

_ROUND_SECONDS = 120.0  # a round that takes longer has failed
_APP = Path(__file__).parent / "stock_app"
_PKI = "state/pki"
_CA = f"{_PKI}/public/ca.crt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """SuperLink and SuperNodes that train."""

    programs: Programs
    clients: list[int]  # process ids, each the root of a tree
    rounds: int
    progress: Path

    def completed(self) -> Iterator[int]:
        """The number of each round, as soon as it is completed."""
        return self.programs.lines(self.progress, self.rounds, seconds=_ROUND_SECONDS)


@contextmanager
def train(clients: int, *, rounds: int) -> Iterator[Run]:
    """A run of so many clients, all in each round; left, nothing of it is there."""
    names = [f"stock-{index}" for index in range(clients)]
    with Programs() as programs:
        fleet, control, progress = free_address(), free_port(), programs.directory / "progress"
        pki.create(programs.directory / _PKI, partitions=names)
        _start_superlink(programs, fleet, control)
        # Before its nodes: one whose key is not registered ends at once.
        commands = [["supernode", "register", f"{_PKI}/public/clients/{name}.pub", "--name", name] for name in names]
        settings = f"clients={clients} rounds={rounds} progress={json.dumps(str(progress))}"
        commands.append(["run", str(_APP), "--run-config", settings])
        programs.call("flwr", sys.executable, "-m", "server.control", text=json.dumps(commands))
        yield Run(
            programs=programs,
            clients=[
                programs.start(
                    name, "flower-supernode",
                    *("--superlink", fleet, "--root-certificates", _CA, "--port", str(free_port())),
                    *("--auth-supernode-private-key", f"{_PKI}/clients/{name}/key"),
                    *("--node-config", f"partition-id={index}"),
                )
                for index, name in enumerate(names)
            ],
            rounds=rounds,
            progress=progress,
        )  # fmt: skip


def _start_superlink(programs: Programs, fleet: str, control: int) -> None:
    programs.start(
        "superlink", "flower-superlink", "--enable-supernode-auth", "--isolation", "subprocess",
        *("--ssl-certfile", f"{_PKI}/server/server.crt", "--ssl-keyfile", f"{_PKI}/server/server.key"),
        *("--ssl-ca-certfile", _CA),
        *("--host", "127.0.0.1", "--port", str(control), "--fleet-api-address", fleet),
    )  # fmt: skip
    connection = programs.directory / "flwr/config.toml"
    connection.parent.mkdir(exist_ok=True)
    connection.write_text(
        f'[superlink]\ndefault = "stock"\n\n[superlink.stock]\naddress = "127.0.0.1:{control}"\n'
        f"root-certificates = {json.dumps(str(programs.directory / _CA))}\n",
        encoding="utf-8",
    )
    programs.wait_until(lambda: listens(control), "SuperLink listens", seconds=60)
