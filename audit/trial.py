"""One run of the shipped client on canaries: policy, ledger, model check and training are those of every round.

Only the ends are the audit's own: the task, whose records are canaries, and the server, which sends zeros and keeps
what comes back. What the client claims is what its ledger holds afterwards, and what its replies say.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from audit import canaries
from client import accounting, compiler
from client.accounting import Release
from client.app import Bench, train_round, trainable
from client.conversation import Conversation
from client.dialogue import Ask
from client.job import RemoteBudget
from client.ledger import Account, Ledger, LedgerError, create, read
from client.policy import Refused
from common import messages
from common.config import Partition, Policy, Privacy, Training
from common.messages import Proposal, Standing

_PARTITION = Partition(name="canaries")


class AuditError(Exception):
    """There is nothing to audit under these terms. One line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is trained: more canaries and steps see more, and take longer."""

    canaries: int  # half of them, drawn anew for each trial, are records
    silent: int  # entries of each of the two parameters that hold noise alone
    steps: int  # at most, over all rounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What an adversary has seen of one run, in units of the clip, and what was claimed of it."""

    round_: Release  # the terms of each round, by the policy
    included: np.ndarray  # bool [canaries]
    seen: np.ndarray  # float64 [rounds, canaries]: each canary's direction of the update
    noise: np.ndarray  # float64 [rounds, 2, silent]: what no record has a part in
    claims: tuple[float, ...]  # after each round, epsilon as the client's reply stated it
    account: Account  # of the ledger file, read afterwards


def run(privacy: Privacy, training: Training, *, rounds: int, steps: int, size: Size) -> Trial:
    """Trains `rounds` rounds of `steps` steps under the owner's terms, in a directory of its own.

    The budget is the owner's, or what these rounds cost where that is more. Raises AuditError if the client refuses.
    """
    rate, sigma = privacy.sample_rate, float(privacy.noise_multiplier)
    cost = accounting.epsilon(privacy.accounting, frozenset({((sigma, rate), rounds * steps)}), privacy.delta)
    terms = privacy.model_copy(update={"epsilon": max(privacy.epsilon, cost), "max_steps_per_round": steps})
    draw = np.random.default_rng(secrets.randbits(128))
    included = draw.random(size.canaries) < 0.5
    with TemporaryDirectory(prefix="fedeps-audit-") as directory:
        root = Path(directory)
        canaries.place(root, included, silent=size.silent, max_grad_norm=privacy.max_grad_norm)
        policy = Policy(task=canaries.SPEC, data_root=root, privacy=terms, training=training, partitions=[_PARTITION])
        path = root / "ledger.jsonl"
        try:
            create(path, partition=_PARTITION.name, privacy=terms)
            ledger = Ledger.open(path, partition=_PARTITION.name, privacy=terms)
            try:
                replies = list(_rounds(policy, ledger, rounds))
            finally:
                ledger.close()
            account = read(path)
        except Refused as refused:
            raise AuditError(f"the client refuses to train: {refused.reason}: {refused.detail}") from None
        except LedgerError as error:
            raise AuditError(f"the client's ledger cannot be used: {error}") from None
    unit = privacy.max_grad_norm * _learning_rate(training) / privacy.batch_size
    updates = [
        {name: array.numpy().astype(np.float64).ravel() / unit for name, array in _arrays(reply).items()}
        for reply in replies
    ]
    return Trial(
        round_=Release(noise_multiplier=sigma, sample_rate=rate, steps=steps),
        included=included,
        seen=np.stack([(update[canaries.LEFT] + update[canaries.RIGHT]) / np.sqrt(2) for update in updates]),
        noise=np.stack([[update[name] for name in canaries.SILENT] for update in updates]),
        claims=tuple(_standing(reply).epsilon_spent for reply in replies),
        account=account,
    )


def _rounds(policy: Policy, ledger: Ledger, rounds: int) -> Iterator[RecordDict]:
    """The client's reply to each round of a server that always sends zeros."""
    with TemporaryDirectory() as folder:
        bench = Bench(policy=policy)
        if policy.training.gradient_mode == "compiled":
            bench.program = compiler.program(bench, Path(folder))
        yield from _replies(policy, ledger, rounds, bench)


def _replies(policy: Policy, ledger: Ledger, rounds: int, bench: Bench) -> Iterator[RecordDict]:
    zeros = ArrayRecord(
        {
            name: Array(np.zeros(tuple(value.shape), dtype=np.float32))
            for name, value in trainable(bench.task().model()).items()
        }
    )
    sequence, head = 0, ""
    for number in range(1, rounds + 1):
        proposal = Proposal(
            task=policy.task,
            round=number,
            steps=policy.privacy.max_steps_per_round,
            learning_rate=_learning_rate(policy.training),
            anchor_sequence=sequence,
            anchor_head=head,
        )
        budget = RemoteBudget(_Host(Conversation(ledger, policy.privacy)), bench)  # type: ignore[arg-type]
        reply = train_round(messages.request(zeros, proposal), f"audit-{number}", bench, _PARTITION, budget)
        standing = _standing(reply)
        sequence, head = standing.ledger_sequence, standing.ledger_head
        yield reply


class _Host:
    """The connection of a worker to its host, where both are one process."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._answer: Any = None

    def send(self, ask: Ask) -> None:
        self._answer = self._conversation.answer(ask)

    def recv(self) -> Any:
        return self._answer


def _learning_rate(training: Training) -> float:
    return min(1.0, float(training.max_learning_rate))


def _arrays(reply: RecordDict) -> ArrayRecord:
    arrays = reply[messages.ARRAYS]
    if not isinstance(arrays, ArrayRecord):
        raise TypeError("a reply without arrays")
    return arrays


def _standing(reply: RecordDict) -> Standing:
    return Standing.from_record(reply[messages.STANDING])
