"""A lying server and its victims: the real SuperLink, with a ServerApp that sends whatever a test wants."""

import base64
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.messages import Proposal
from common.tasks import load_task
from tests.federation import Federation, federation, free_ports, wait_for

TASK = "tests.hostile.task:Watched"
HONEST, RIGGED, BROKEN, SPARE = range(4)  # partitions; BROKEN is served by a client with holes, SPARE by none
REPLY_SECONDS = 60.0


class Liar:
    """The lying server and its victims, as a test sees them."""

    def __init__(self, run: Federation) -> None:
        self.run = run
        self.mailbox = run.folder / "mailbox"
        self._numbers = itertools.count()

    def ask(self, partition: int, records: dict[str, Any], kind: str = "train") -> dict[str, Any]:
        """What the client that holds the partition replies."""
        question = {
            "partition": self.run.partitions[partition], "type": kind, "records": records, "seconds": REPLY_SECONDS
        }  # fmt: skip
        path = self.mailbox / f"{next(self._numbers):04}.part"
        path.write_text(json.dumps(question))
        path.replace(path.with_suffix(".question"))
        reply = path.with_suffix(".reply")
        wait_for(reply.exists, f"an answer of the ServerApp to {path.name}", REPLY_SECONDS + 30)
        return json.loads(reply.read_text())

    def records_read(self) -> int:
        return len((self.run.folder / "data/records-read").read_text())

    def honest(self, **changes: Any) -> dict[str, Any]:
        """The records of an honest request, with a few keys of its config changed; None removes a key."""
        proposal = Proposal(task=TASK, round=1, steps=2, learning_rate=16.0, anchor_sequence=0, anchor_head="")
        values = {key: value for key, value in (asdict(proposal) | changes).items() if value is not None}
        arrays = {name: array(weight) for name, weight in weights().items()}
        return {"arrays": {"kind": "arrays", "values": arrays}, "config": {"kind": "config", "values": values}}

    @contextmanager
    def untouched(self, partition: int) -> Iterator[None]:
        """Nothing is charged and no record is read in the meantime."""
        before = self.run.account(self.run.partitions[partition]).sequence, self.records_read()
        yield
        after = self.run.account(self.run.partitions[partition]).sequence, self.records_read()
        assert after == before, f"ledger sequence and records read were {before}, are {after}"

    def refuses(self, partition: int, records: dict[str, Any], reason: str) -> str:
        """Asserts a typed refusal that cost nothing and tells nothing; its detail."""
        with self.untouched(partition):
            reply = self.ask(partition, records)
        assert set(reply) == {"records"}, reply
        assert set(reply["records"]) <= {"refusal", "standing", "statement"}
        assert reply["records"]["refusal"]["reason"] == reason, reply
        self.tells_nothing(reply)
        return reply["records"]["refusal"]["detail"]

    def tells_nothing(self, reply: dict[str, Any]) -> None:
        """Asserts that the reply names no file of the client's, and is short."""
        text = json.dumps(reply)
        for secret in (str(self.run.folder), "state/", "ledger.jsonl", "Traceback", ".py"):
            assert secret not in text, text
        assert len(text) - len(json.dumps(reply.get("records", {}).get("statement"))) < 2000


def weights() -> dict[str, np.ndarray]:
    """Zeros in the shapes of the client's own model."""
    return {name: p.detach().numpy() * 0 for name, p in load_task("digits", Path()).model().named_parameters()}


def array(value: np.ndarray, **lies: Any) -> dict[str, Any]:
    """A Flower array in JSON, with some of its fields replaced; `data` is bytes."""
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    fields: dict[str, Any] = {
        "dtype": str(value.dtype),
        "shape": value.shape,
        "stype": "numpy.ndarray",
        "data": buffer.getvalue(),
    }
    fields |= lies
    return {**fields, "data": base64.b64encode(fields["data"]).decode()}


@contextmanager
def lying(folder: Path, *, broken: bool = False) -> Iterator[Liar]:
    """The server, a client with two partitions and, where it is wanted, the client with holes; all connected."""
    with federation(folder, clients=4) as run:
        (run.folder / "mailbox").mkdir()
        (run.folder / "data").mkdir()
        (run.folder / "data/records-read").touch()
        run.policy_content["task"] = TASK
        everyone = run.policy_content["partitions"]
        run.policy_content["partitions"] = [everyone[HONEST], everyone[RIGGED]]
        run.configure()
        run.start("server", "-m", "tests.hostile.superlink")
        run.start_client()
        if broken:
            content = run.policy_content | {"partitions": [everyone[BROKEN]]}
            content["client"] = content["client"] | {"metrics_address": f"127.0.0.1:{free_ports(1)[0]}"}
            (run.folder / "broken.yaml").write_text(yaml.safe_dump(content))
            run.start("broken", "-m", "tests.hostile.broken", "--policy", "broken.yaml")
        wait_for(lambda: run.log("client").count(": connected\n") == 2, "the client to connect", 120)
        if broken:
            wait_for(lambda: run.log("broken").count(": connected\n") == 1, "the broken client to connect", 120)
        yield Liar(run)
