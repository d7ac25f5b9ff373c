"""This product's own federation, as its two programs, in a temporary directory with free ports, TLS and node keys."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.programs import Programs, free_address, free_port
from client import ledger
from common import pki
from common.config import ClientSettings, Compression, Federation, Partition, Policy, Privacy, ServerSettings, Training

_ROUND_SECONDS = 300.0  # a round that takes longer has failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One server and one client process that train."""

    programs: Programs
    server: int  # process ids, each the root of a tree
    client: int
    partitions: int
    rounds: int

    @property
    def clients(self) -> list[int]:
        return [self.client]

    def completed(self) -> Iterator[int]:
        """The number of each round, as soon as it is completed."""
        return self.programs.lines(self._latest("rounds.jsonl"), self.rounds, seconds=_ROUND_SECONDS)

    def results(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The lines of rounds.jsonl and summary.json, once the server has ended the run.

        Raises BenchmarkError unless every partition trained in every round.
        """
        self.programs.wait("server", seconds=_ROUND_SECONDS)
        lines = [json.loads(line) for line in self._latest("rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        trained = [len(line["trained"]) for line in lines]
        if trained != [self.partitions] * self.rounds:
            raise self.programs.problem(f"expected {self.partitions} to train {self.rounds} times, found {trained}")
        return lines, json.loads(self._latest("summary.json").read_text(encoding="utf-8"))

    def _latest(self, file: str) -> Path:
        return self.programs.directory / "runs/latest" / file


@contextmanager
def train(
    partitions: list[Partition],
    privacy: Privacy,
    training: Training,
    *,
    task: str = "digits",
    rounds: int,
    learning_rate: float,
    client: str = "client",
    compression: Compression = "none",
    reply_memory_mb: float = 1024.0,
) -> Iterator[Run]:
    """A run of all `partitions` in each round; left, nothing of it is there.

    `client` is the module that is run with the policy.
    """
    fleet = free_address()
    names = [partition.name for partition in partitions]
    federation = Federation(
        task=task,
        rounds=rounds,
        min_clients=len(names),
        fit_clients=len(names),
        steps_per_round=privacy.max_steps_per_round,
        learning_rate=learning_rate,
        round_deadline_seconds=_ROUND_SECONDS,
        connect_deadline_seconds=_ROUND_SECONDS,
        compression=compression,
        server=ServerSettings(
            fleet_address=fleet,
            control_port=free_port(),
            metrics_address=free_address(),
            reply_memory_mb=reply_memory_mb,
        ),
    )
    policy = Policy(
        task=task,
        privacy=privacy,
        training=training,
        client=ClientSettings(server_address=fleet, metrics_address=free_address()),
        partitions=partitions,
    )
    with Programs() as programs:
        for document in (federation, policy):
            content = yaml.safe_dump(document.model_dump(mode="json"))
            (programs.directory / _file(document)).write_text(content, encoding="utf-8")
        pki.create(programs.directory / "state/pki", partitions=names)
        for name in names:
            ledger.create(programs.directory / policy.ledger_path(name), partition=name, privacy=privacy)
        yield Run(
            programs=programs,
            server=programs.start("server", sys.executable, "-m", "server", "--config", _file(federation)),
            client=programs.start("client", sys.executable, "-m", client, "--policy", _file(policy)),
            partitions=len(names),
            rounds=rounds,
        )


def split(task: str, clients: int) -> list[Partition]:
    """A task's data split over so many owners."""
    return [Partition(name=f"{task}-{index}-of-{clients}", index=index, of=clients) for index in range(clients)]


def _file(document: Federation | Policy) -> str:
    return f"{type(document).__name__.lower()}.yaml"
