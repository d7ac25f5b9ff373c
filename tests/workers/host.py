"""The host's side of the workers, driven by a test: `python -m tests.workers.host POLICY DESCRIPTOR`.

A program of its own: the zygote must be forked from a process with one thread, and what it imports is looked at.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from client.zygote import start_zygote
from common.config import Policy, load
from common.logs import start_logging

END_SECONDS = 10.0


def main(policy_path: Path, descriptor: int) -> None:
    """Answers `(number, partition, inbound)` with `(number, what came of it)` until the test closes the connection."""
    start_logging()
    policy = load(Policy, policy_path)
    zygote = start_zygote(policy)

    from client.conversation import Conversation
    from client.dialogue import Job
    from client.ledger import Ledger, LedgerError
    from client.workers import WorkerDied, Workers, ZygoteDied

    test = Connection(descriptor)
    workers = Workers(zygote, policy.training.max_workers)
    ledgers: dict[str, Ledger | None] = dict.fromkeys(partition.name for partition in policy.partitions)
    for name in ledgers:
        with suppress(LedgerError):
            ledgers[name] = Ledger.open(policy.ledger_path(name), partition=name, privacy=policy.privacy)

    def serve(number: int, name: str, inbound: Any) -> None:
        partition = next(partition for partition in policy.partitions if partition.name == name)
        conversation = Conversation(ledgers[name], policy.privacy)
        try:
            result: Any = workers.run(Job(partition=partition, inbound=inbound), conversation.answer)
        except (WorkerDied, ZygoteDied) as error:
            result = type(error)
        test.send((number, result))

    def facts() -> dict[str, Any]:
        return {"modules": set(sys.modules), "deaths": workers.deaths, "gpu": workers.gpu_memory_bytes()}

    with suppress(EOFError):
        while True:
            number, *job = test.recv()
            if job:
                threading.Thread(target=serve, args=(number, *job), daemon=True).start()
            else:
                test.send((number, facts()))
    # In order, each with time to write down what it has covered: the end of a parent would kill its children.
    (child,) = _children(os.getpid())
    for _, worker in workers._idle:
        worker.close()
    deadline = time.monotonic() + END_SECONDS
    while _children(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    zygote.close()
    os.waitpid(child, 0)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
