"""This product's own federation, as its programs, in a temporary directory with free ports, TLS and node keys."""

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

_ROUND_SECONDS, _SECONDS_EACH = 300.0, 0.3  # a round that takes longer, for so many partitions, has failed
_SHOWN = 5  # of many partitions


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One server and its client processes, most often one, that train."""

    programs: Programs
    server: int  # process ids, each the root of a tree
    clients: list[int]
    partitions: int  # of all clients together
    rounds: int

    def completed(self) -> Iterator[int]:
        """The number of each round, as soon as it is completed."""
        return self.programs.lines(self._latest("rounds.jsonl"), self.rounds, seconds=_seconds(self.partitions))

    def results(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The lines of rounds.jsonl and summary.json, once the server has ended the run.

        Raises BenchmarkError unless every partition trained in every round.
        """
        self.programs.wait("server", seconds=_seconds(self.partitions))
        lines = [json.loads(line) for line in self._latest("rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        lost = [_lost(line) for line in lines if len(line["trained"]) != self.partitions]
        if lost or len(lines) != self.rounds:
            text = f"{len(lines)} of {self.rounds} rounds; of {self.partitions} partitions did not train: "
            raise self.programs.problem(text + ("; ".join(lost) or "none"))
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
    processes: int = 1,
) -> Iterator[Run]:
    """A run of all `partitions`, dealt out to so many client processes, in each round; left, nothing of it is there.

    `client` is the module that is run with each policy.
    """
    fleet = free_address()
    seconds = _seconds(len(partitions))
    names = [partition.name for partition in partitions]
    federation = Federation(
        task=task,
        rounds=rounds,
        min_clients=len(names),
        fit_clients=len(names),
        steps_per_round=privacy.max_steps_per_round,
        learning_rate=learning_rate,
        round_deadline_seconds=seconds,
        connect_deadline_seconds=seconds,
        compression=compression,
        server=ServerSettings(
            fleet_address=fleet,
            control_port=free_port(),
            metrics_address=free_address(),
            reply_memory_mb=reply_memory_mb,
        ),
    )
    policies = [
        Policy(
            task=task,
            privacy=privacy,
            training=training,
            client=ClientSettings(
                server_address=fleet, metrics_address=free_address(), state=Path(f"state/clients-{number}")
            ),
            partitions=partitions[number::processes],
        )
        for number in range(processes)
    ]
    with Programs() as programs:
        files = {"server.yaml": federation, **{f"client-{number}.yaml": each for number, each in enumerate(policies)}}
        for file, document in files.items():
            content = yaml.safe_dump(document.model_dump(mode="json"))
            (programs.directory / file).write_text(content, encoding="utf-8")
        pki.create(programs.directory / "state/pki", partitions=names)
        for policy in policies:
            for partition in policy.partitions:
                path = programs.directory / policy.ledger_path(partition.name)
                ledger.create(path, partition=partition.name, privacy=privacy)
        yield Run(
            programs=programs,
            server=programs.start("server", sys.executable, "-m", "server", "--config", "server.yaml"),
            clients=[
                programs.start(f"client-{number}", sys.executable, "-m", client, "--policy", f"client-{number}.yaml")
                for number in range(processes)
            ],
            partitions=len(names),
            rounds=rounds,
        )


def split(task: str, clients: int) -> list[Partition]:
    """A task's data split over so many owners."""
    return [Partition(name=f"{task}-{index}-of-{clients}", index=index, of=clients) for index in range(clients)]


def _seconds(partitions: int) -> float:
    return _ROUND_SECONDS + _SECONDS_EACH * partitions


def _lost(line: dict[str, Any]) -> str:
    """What a round's line says of those who did not train."""
    why = {**line["refused"], **line["failed"]}
    some = ", ".join(f"{name}: {reason}" for name, reason in list(why.items())[:_SHOWN])
    return f"round {line['round']}: {len(why)} ({some})"
