"""Flower's grid without a network: partitions answer by functions, at once, later or never."""

import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from common import messages
from common.messages import ARRAYS, CONFIG, Proposal, Reason, Standing
from tests.wire import identify

Answer = Callable[[str, Message], RecordDict | Error | None]  # None: never


class Interrupted(BaseException):
    """The ServerApp is killed here."""


class FakeGrid(Grid):
    """Each partition that has an answer is connected. `asked` holds who was asked, message by message.

    `most_held` and `most_pulled` are the most messages without a pulled reply, and the most pulled at once, so far.
    """

    def __init__(self, answers: dict[str, Answer], *, kill_in_round: int | None = None) -> None:
        identify()
        self.answers = answers
        self.delays: dict[str, float] = {}
        self.undecodable: set[str] = set()
        self.asked: list[tuple[int, str]] = []
        self.most_held = self.most_pulled = 0
        self.stumbles = 0  # pushes that fail, once they have stored the first of their messages
        self._kill_in_round = kill_in_round
        self._replies: dict[str, tuple[float, str, Message | None]] = {}

    def get_nodes(self) -> Iterable[Any]:
        nodes = [SimpleNamespace(name=name, node_id=1000 + i) for i, name in enumerate(self.answers)]
        return [*nodes, SimpleNamespace(name="", node_id=1)]  # one that nobody registered under a name

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = {node.node_id: node.name for node in self.get_nodes()}
        ids = []
        for message in messages:
            if ids and self.stumbles:
                self.stumbles -= 1
                raise RuntimeError("500 Internal Server Error")
            name, proposal = names[message.metadata.dst_node_id], Proposal.from_record(message.content[CONFIG])
            if proposal.round == self._kill_in_round:
                raise Interrupted
            if known := message.metadata.message_id:
                ids.append(known)  # sent again, it is the same one
                continue
            self.asked.append((proposal.round, name))
            ids.append(f"{len(self.asked)}")
            message.metadata.__dict__["_message_id"] = ids[-1]  # as SuperLink does
            answer = self.answers[name](name, message)
            reply = None if answer is None else Message(answer, reply_to=message)
            self._replies[ids[-1]] = (time.monotonic() + self.delays.get(name, 0.0), name, reply)
        self.most_held = max(self.most_held, len(self._replies))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message_ids = set(message_ids)
        self.most_pulled = max(self.most_pulled, len(message_ids))
        ready = [id for id in message_ids if id in self._replies and self._replies[id][0] <= time.monotonic()]
        pulled = [self._replies.pop(id) for id in ready]  # forgotten before they are decoded, as SuperLink does
        if any(name in self.undecodable for _, name, _ in pulled):
            raise ValueError("not a message")
        return [reply for _, _, reply in pulled if reply is not None]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *_: Any, **__: Any) -> Any: ...

    def get_node_ids(self) -> Iterable[int]: ...

    def send_and_receive(self, *_: Any, **__: Any) -> Any: ...


def trains(name: str, message: Message, **changes: Any) -> RecordDict:
    """An update that depends on the partition, the round and the model, and on nothing else."""
    proposal = Proposal.from_record(message.content[CONFIG])
    generator = np.random.default_rng([proposal.round, *name.encode()])
    arrays = {
        key: Array(array.numpy() + generator.normal(0, 0.1, array.shape).astype(np.float32))
        for key, array in message.content[ARRAYS].items()
    }
    return messages.update(ArrayRecord(arrays), standing(name, message, **changes), weight=1.0)


def refuses(reason: Reason, **changes: Any) -> Answer:
    return lambda name, message: messages.refusal(reason, "no", standing(name, message, **changes))


def standing(name: str, message: Message, **changes: Any) -> Standing:
    """That of a client that pays before it trains: its ledger is ahead of the server's anchor."""
    proposal = Proposal.from_record(message.content[CONFIG])
    content = {
        "partition": name,
        "epsilon_spent": proposal.round / 10,
        "epsilon_budget": 3.0,
        "delta": 1e-5,
        "rounds_remaining": 30,
        "ledger_sequence": proposal.anchor_sequence + 2,
        "ledger_head": f"{proposal.anchor_sequence + 2:064x}",
    }
    return Standing(**(content | changes))
