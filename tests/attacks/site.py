"""An owner's site under attack: a real client process, whose server is the test, over gRPC and TLS."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Array, ArrayRecord, Message, Metadata
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.fleet import pack
from client.ledger import Account
from common.messages import ARRAYS, REFUSAL, Proposal, request
from tests.federation import Federation, children, federation, wait_for
from tests.hostile.fleet import LyingFleet, Sent, serving
from tests.test_hostile_server import weights

TASK = "tests.attacks.task:Rigged"
LEARNING_RATE = 16.0
REPLY_SECONDS = 90.0
START_SECONDS = 120.0

Weights = dict[str, np.ndarray]


class Site:
    """The client, its files, and what its server makes of it."""

    def __init__(self, run: Federation, fleet: LyingFleet) -> None:
        self.run, self.fleet = run, fleet
        self.port = int(run.fleet.rpartition(":")[2])
        self.folder, self.data = run.folder, run.folder / "data"
        self._public = [_public_key(run.folder / f"state/pki/public/clients/{name}.pub") for name in run.partitions]
        for key in self._public:
            fleet.admit(key)

    def start(
        self, *, variant: str | None = None, around: Sequence[str] = (), log: str = "client", **environment: str
    ) -> subprocess.Popen[bytes]:
        """The client, or the variant of it that a function in `tests.attacks.variants` makes; it is connected then.

        `around` is a Python program's arguments, which runs the command that follows them.
        """
        before = self.run.log(log).count(": connected\n")
        module = ["-m", "tests.attacks.variants", variant] if variant else ["-m", "client"]
        inner = [sys.executable] if around else []
        process = self.run.start(log, *around, *inner, *module, "--policy", "policy.yaml", **environment)
        count = len(self.run.policy_content["partitions"])
        said: Callable[[], bool] = lambda: self.run.log(log).count(": connected\n") >= before + count  # noqa: E731
        try:
            wait_for(lambda: said() or process.poll() is not None, "the client to connect", START_SECONDS)
        finally:
            assert said(), self.run.log(log)
        return process

    def restart(self, process: subprocess.Popen[bytes], **how: Any) -> subprocess.Popen[bytes]:
        process.terminate()
        assert process.wait(60) == 0, self.run.log("client")
        return self.start(**how)

    def order(self, obeyed: Callable[..., None] | None) -> None:
        """What the task does from the next job on."""
        name = f"{obeyed.__module__}:{obeyed.__name__}" if obeyed else ""
        if name and not name.startswith("tests."):  # pytest knows its files by their own names
            name = f"tests.attacks.{name}"
        path = self.data / "order"
        path.with_suffix(".part").write_text(name)
        path.with_suffix(".part").replace(path)

    def tell(self, partition: int, sent: Sent | str) -> None:
        self.fleet.outbox[self._public[partition]].append(sent)

    def hear(self, partition: int, seconds: float = REPLY_SECONDS) -> Message | None:
        try:
            return self.fleet.inbox[self._public[partition]].get(timeout=seconds)
        except queue.Empty:
            return None

    def ask(self, partition: int, arrays: Weights | None = None, **changes: Any) -> Message:
        """The reply to an honest request with some keys of its proposal changed."""
        self.tell(partition, Sent.whole(pack(question(arrays, **changes))))
        reply = self.hear(partition)
        assert reply is not None, self.run.log("client")
        return reply

    def account(self, partition: int) -> Account:
        return self.run.account(self.run.partitions[partition])

    def workers(self, client: subprocess.Popen[bytes]) -> list[int]:
        return [worker for zygote in children(client.pid) for worker in children(zygote)]

    def end_workers(self, client: subprocess.Popen[bytes]) -> None:
        """The next job is for a fresh fork of the zygote."""
        before = self.workers(client)
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not set(before) & set(self.workers(client)), "the end of the workers")


class Recorder(LyingFleet):
    """Keeps every byte that its clients send: each request, and the metadata of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[bytes] = []

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if not name[0].isupper():
            return method

        def recorded(request: Any, context: Any) -> Any:
            said = "\n".join(f"{key}: {value!r}" for key, value in context.invocation_metadata())
            self.heard.append(request.SerializeToString() + b"\n" + said.encode())
            return method(request, context)

        return recorded


@contextmanager
def site(
    folder: Path,
    *,
    clients: int = 4,
    privacy: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    fleet: LyingFleet | None = None,
) -> Iterator[Site]:
    """A site whose server listens and whose client is not started yet. One worker serves it, and is never idle."""
    with federation(folder, clients=clients, privacy=privacy) as run:
        (folder / "data").mkdir()
        run.policy_content["task"] = TASK
        run.policy_content["training"] = {"max_workers": 1, "idle_seconds": 600.0, "device": "cpu", **(training or {})}
        run.configure()
        made = Site(run, fleet or LyingFleet())
        with serving(made.fleet, run.fleet, folder / "state/pki"):
            yield made


def question(arrays: Weights | None = None, **changes: Any) -> Message:
    """A request to train. Each has an id of its own."""
    values = {
        "task": TASK, "round": 1, "steps": 2, "learning_rate": LEARNING_RATE, "anchor_sequence": 0, "anchor_head": ""
    }  # fmt: skip
    record = ArrayRecord({name: Array(value) for name, value in (arrays or weights()).items()})
    metadata = Metadata(
        run_id=1, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="", group_id="1",
        created_at=time.time(), ttl=600.0, message_type="train",
    )  # fmt: skip
    return Message(content=request(record, Proposal(**{**values, **changes})), metadata=metadata)  # type: ignore[call-overload]


def refusal(reply: Message) -> str | None:
    """The reason of a typed no; None for anything else."""
    return str(reply.content[REFUSAL]["reason"]) if reply.has_content() and REFUSAL in reply.content else None


def moved(reply: Message, arrays: Weights | None = None) -> np.ndarray:
    """What an update moved, flat, float64."""
    assert reply.has_content(), reply.error
    assert ARRAYS in reply.content, dict(reply.content)
    released = reply.content[ARRAYS]
    parts = [np.ravel(released[name].numpy().astype(np.float64) - old) for name, old in (arrays or weights()).items()]
    return np.concatenate(parts)


def _public_key(path: Path) -> bytes:
    return public_key_to_bytes(load_ssh_public_key(path.read_bytes()))  # type: ignore[arg-type]
