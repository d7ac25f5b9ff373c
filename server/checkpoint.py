"""What must survive any crash, in one file: the model, the optimizer's moments, the round, the ledgers' anchors.

The file is replaced whole, so that it always shows the end of some round. It is never silently started anew:
the anchors in it outlive runs, and without them a partition's rolled back ledger would go unnoticed.
"""

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from common.config import Federation
from common.files import replace
from common.messages import Standing
from server.outcome import UnusableError

Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]  # by parameter name

_FILE = "checkpoint.safetensors"
_KEY = "fedeps"
_HERE = {"server", "data_root", "round_deadline_seconds", "connect_deadline_seconds"}  # does not define the run


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """The head of a partition's ledger, as newly as the server has seen it."""

    sequence: int = 0  # 0: none seen
    head: str = ""


@dataclass(kw_only=True, slots=True)
class Member:
    """One partition in this run."""

    rounds_trained: int = 0
    refusals: int = 0
    exhausted: bool = False
    standing: dict[str, Any] | None = None  # the newest, as `Standing` has it
    statement: str | None = None  # the newest that it signed in this run, as `Signed.dumps` has it

    def budget(self) -> dict[str, Any]:
        """The epsilon figures, none where the partition has not sent any."""
        names = ("epsilon_spent", "epsilon_budget", "delta", "rounds_remaining")
        return {name: (self.standing or {}).get(name) for name in names}


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """The state of a run between two rounds."""

    run: str
    digest: str
    arrays: Arrays
    moments: dict[str, Arrays] = field(default_factory=dict)  # of the server's optimizer: "m" and "v"
    round: int = 0  # completed
    seconds: float = 0.0  # spent so far, over all restarts
    finished: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    anchors: dict[str, Anchor] = field(default_factory=dict)  # of every partition ever seen

    def member(self, partition: str) -> Member:
        return self.members.setdefault(partition, Member())

    def anchor(self, partition: str) -> Anchor:
        return self.anchors.get(partition, Anchor())

    def note(self, standing: Standing) -> None:
        """Keep a partition's newest standing. An anchor never goes backwards."""
        self.member(standing.partition).standing = asdict(standing)
        if standing.ledger_sequence > self.anchor(standing.partition).sequence:
            self.anchors[standing.partition] = Anchor(sequence=standing.ledger_sequence, head=standing.ledger_head)

    def save(self, state: Path) -> None:
        """Write it to the state directory, durably and atomically.

        In the round's path on purpose: a model of 20 MB takes 0.07 s, with FedAdam's moments 0.17 s, one of 100 MB 0.3
        and 0.7 s, of the many seconds that such a round takes. Written while the next round is asked for, a crash
        could lose anchors of a round that was already announced.
        """
        tensors = {f"model.{name}": array for name, array in self.arrays.items()}
        for moment, arrays in self.moments.items():
            tensors |= {f"{moment}.{name}": array for name, array in arrays.items()}
        facts = {
            "run": self.run,
            "digest": self.digest,
            "round": self.round,
            "seconds": self.seconds,
            "finished": self.finished,
            "members": {name: asdict(member) for name, member in self.members.items()},
            "anchors": {name: asdict(anchor) for name, anchor in self.anchors.items()},
        }
        replace(state / _FILE, safetensors.numpy.save(tensors, metadata={_KEY: json.dumps(facts)}))


def resume(config: Federation, initial: Arrays) -> Checkpoint:
    """The unfinished run that `config` defines, or else a new one from `initial` that keeps the anchors.

    Raises UnusableError if there is a file that cannot be read or does not fit the task's model.
    """
    digest = define(config)
    last = _load(config.server.state / _FILE)
    if last is None or last.finished or last.digest != digest:
        return Checkpoint(
            run=f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
            digest=digest,
            arrays=initial,
            anchors=last.anchors if last else {},
        )
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (initial, last.arrays)]
    if shapes[0] != shapes[1]:
        raise UnusableError(
            f"server.state: {config.server.state / _FILE} holds round {last.round} of another model than task"
            f" {config.task!r} makes now (restore the task's code, or change `seed` for a new run)"
        )
    return last


def finished(config: Federation) -> bool:
    """Whether the last run is the one that `config` defines, and has ended. Raises UnusableError as `resume` does."""
    last = _load(config.server.state / _FILE)
    return last is not None and last.finished and last.digest == define(config)


def define(config: Federation) -> str:
    """A digest of everything that makes two runs the same run: not addresses, paths and deadlines."""
    not_there = {"compression"} if config.compression == "none" else set()  # as in runs from before that key
    content = json.dumps(config.model_dump(mode="json", exclude=_HERE | not_there), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _load(path: Path) -> Checkpoint | None:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            facts = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        facts["members"] = {name: Member(**member) for name, member in facts["members"].items()}
        facts["anchors"] = {name: Anchor(**anchor) for name, anchor in facts["anchors"].items()}
        groups: dict[str, Arrays] = {}
        for name, tensor in tensors.items():
            group, _, parameter = name.partition(".")
            groups.setdefault(group, {})[parameter] = tensor
        return Checkpoint(arrays=groups.pop("model"), moments=groups, **facts)
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UnusableError(
            f"server.state: {path} cannot be read: {error!r} (restore it from a copy; deleting it forgets the"
            " anchors, by which a rolled back ledger is noticed)"
        ) from error
