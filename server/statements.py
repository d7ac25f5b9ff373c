"""The partitions' signed statements on their way to `privacy.json`: looked at like all that clients send, and kept.

Nobody needs to believe the server here. What it checks keeps rubbish out of the file; what counts is the signature,
which its reader checks again with `python -m client.statement verify`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord

from common import statement
from common.config import Federation
from common.files import replace
from common.messages import SIGNED, Standing
from common.statement import Signed, StatementError
from server.checkpoint import Checkpoint

_FILE = "privacy.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Witness:
    """Takes the statements of one run."""

    run: str
    task: str
    public_keys: Path  # one <partition>.pub each, as they are registered

    def take(self, record: object, standing: Standing, *, update: str | None) -> Signed:
        """The statement that came with `standing` and with parameters of the digest `update`.

        Raises:
            StatementError: it is not one, or says something else than the reply that brought it.
        """
        text = record.get(SIGNED) if isinstance(record, ConfigRecord) and len(record) == 1 else None
        if not isinstance(text, str):
            raise StatementError("expected a record with a signed statement")
        signed = Signed.loads(text)
        said = signed.statement
        claims = {
            "partition": (said.partition, standing.partition),
            "task": (said.task, self.task),
            "run": (said.run.name if said.run else self.run, self.run),
            "ledger.sequence": (said.ledger.sequence, standing.ledger_sequence),
            "ledger.hash": (said.ledger.hash, standing.ledger_head),
            "epsilon_spent": (said.epsilon_spent, standing.epsilon_spent),
            "epsilon_budget": (said.epsilon_budget, standing.epsilon_budget),
            "delta": (said.delta, standing.delta),
            "update_sha256": (said.update_sha256, update),
        }
        for name, (stated, expected) in claims.items():
            if stated != expected:
                raise StatementError(f"{name}: states {stated}, the reply says {expected}")
        path = self.public_keys / f"{standing.partition}.pub"
        try:
            signed.verify(statement.public_key(path.read_bytes()))
        except OSError as error:
            raise StatementError(f"{path}: {error.strerror}") from None
        return signed


def write(directory: Path, config: Federation, checkpoint: Checkpoint, *, model: bytes) -> None:
    """Write `privacy.json`: each asked partition's newest statement, and around them what nobody signed."""
    members = sorted(checkpoint.members.items())
    content = {
        "run": checkpoint.run,
        "task": config.task,
        "model_sha256": hashlib.sha256(model).hexdigest(),
        "without_statement": [name for name, member in members if member.statement is None],
        "statements": [Signed.loads(member.statement).content() for _, member in members if member.statement],
    }
    replace(directory / _FILE, json.dumps(content, indent=2).encode() + b"\n")


def read(directory: Path) -> tuple[list[Signed], list[str]] | None:
    """The statements of a run and the partitions without one; None where the run has no such file."""
    try:
        content: dict[str, Any] = json.loads((directory / _FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return [Signed.parse(each) for each in content["statements"]], content["without_statement"]
