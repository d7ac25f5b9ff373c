"""One partition's life in the fleet: join, ask for a message, have it answered, send the reply, as the rota says.

Whatever happens to one partition (an unregistered key, a ledger that cannot be trusted) the others go on.
"""

import logging
import random
import threading
import time

from client.conversation import Conversation
from client.fleet import BrokenMessage, Fleet, FleetError, Inbound, Node, Outbound, failure, heartbeat_seconds
from client.ledger import Ledger, LedgerError
from client.statement.making import Signer
from client.workers import WorkerDied, Workers
from common.config import Partition, Policy
from common.messages import Reason

log = logging.getLogger(__name__)

SEND_TRIES = 5
BACK_OFF_SECONDS = (1.0, 10.0)
BROKEN_SECONDS = 0.2  # after a message that could not be had


class Member:
    """A partition with its key, its ledger and its place in the fleet."""

    def __init__(self, partition: Partition, policy: Policy, fleet: Fleet, workers: Workers) -> None:
        self.partition = partition
        self.refusals = dict.fromkeys(Reason, 0)
        self.connected = False
        self.round = 0
        self.train_seconds = 0.0
        self.samples_per_second = 0.0
        self.ledger_problem: str | None = None
        self._policy = policy
        self._fleet = fleet
        self._workers = workers
        self._ledger: Ledger | None = None
        self._node = Node(
            fleet,
            policy.key_path(partition.name),
            policy.client.max_message_bytes,
            heartbeat_seconds=heartbeat_seconds(len(policy.partitions)),
        )
        self._signer = Signer(policy, partition.name)
        self._delay = BACK_OFF_SECONDS[0]
        self._said = ""
        self._open_ledger()

    def poll(self) -> tuple[Inbound | None, float | None]:
        """The next message if there is one; and after a failure the seconds after which to ask again.

        Joins the fleet where the node is not in it.
        """
        try:
            if not self._node.active:
                self._node.activate()
            inbound = self._node.receive()
        except FleetError as error:
            self._not_connected(error)
            wait, self._delay = self._delay * jitter(), min(BACK_OFF_SECONDS[1], 2 * self._delay)
            return None, wait
        except BrokenMessage as error:
            log.warning("%s: a message stays unanswered: %s", self.partition.name, error)
            return None, BROKEN_SECONDS
        self._delay = BACK_OFF_SECONDS[0]
        self._connected()
        return inbound, None

    def serve(self, inbound: Inbound, stop: threading.Event) -> None:
        """Has a message answered and sends the reply. Raises ZygoteDied where no worker can be had."""
        self._serve(inbound, stop)

    def key_problem(self) -> str | None:
        """What is wrong with the partition's key; it is looked for again until it is right."""
        try:
            self._node.load_key()
        except FleetError as error:
            return str(error)
        return None

    def heartbeat(self) -> None:
        """Tells the server that this node lives. Called for all members by one thread, whatever they are at."""
        if not self._node.active:
            return
        try:
            self._node.heartbeat()
        except FleetError as error:
            log.debug("%s: heartbeat: %s", self.partition.name, error)

    def leave(self) -> None:
        """Leaves the fleet and gives the ledger free."""
        self.connected = False
        try:
            self._node.deactivate()
        except FleetError as error:
            log.debug("%s: leaving: %s", self.partition.name, error)
        if self._ledger is not None:
            self._ledger.close()

    def _serve(self, inbound: Inbound, stop: threading.Event) -> None:
        started = time.monotonic()
        conversation = Conversation(self._ledger or self._open_ledger(), self._policy.privacy, self._signer)
        try:
            done = self._workers.run(self._workers.job(self.partition, inbound), conversation.answer)
        except WorkerDied:
            log.error("%s: the worker died; what it had reserved stays spent", self.partition.name)
            outbound = failure(inbound, "the worker died")
        else:
            outbound = done.outbound
            self.round = done.round
            if done.refused is not None:
                self.refusals[done.refused] += 1
            if conversation.committed:
                self.train_seconds = done.seconds
                self.samples_per_second = done.steps * self._policy.privacy.batch_size / done.seconds
        if conversation.problem or conversation.committed:
            # A false anchor is refused like a true one; the next honest charge shows that the ledger was sound.
            self.ledger_problem = conversation.problem
        self._send(outbound, time.monotonic() - started, conversation.ledger if conversation.committed else None, stop)

    def _send(self, outbound: Outbound, seconds: float, charged: Ledger | None, stop: threading.Event) -> None:
        for attempt in range(SEND_TRIES):
            try:
                if charged is not None:
                    charged.check()  # where the ledger was replaced meanwhile, this update is not charged
                self._node.send(outbound, seconds)
                self._connected()
                return
            except LedgerError as error:
                self.ledger_problem = str(error)
                log.error("%s: the update is not sent: %s", self.partition.name, error)
                return
            except FleetError as error:
                if error.retry:
                    self._not_connected(error)
                    if attempt + 1 < SEND_TRIES and not stop.wait(2.0**attempt * jitter()):
                        continue
                log.warning("%s: a reply is given up: %s", self.partition.name, error)
                return

    def _open_ledger(self) -> Ledger | None:
        name = self.partition.name
        try:
            self._ledger = Ledger.open(
                self._policy.ledger_path(name),
                partition=name,
                privacy=self._policy.privacy,
                anchor=self._policy.anchor_path(name),
            )
            self.ledger_problem = None
        except LedgerError as error:
            self.ledger_problem = str(error)
            self._say(f"trains nothing: {error}", logging.ERROR)
        return self._ledger

    def _connected(self) -> None:
        if not self.connected:
            self.connected = True
            self._say("connected")

    def _not_connected(self, error: FleetError) -> None:
        self.connected = False
        if error.retry:
            # The node is kept: to a server that lives on it is alive, and would be refused if it joined anew.
            text = self._fleet.explain()
        elif self._node.active:
            self._node.lost()
            text = f"the server, perhaps a new one, does not take this node any more: {error}; joins it again"
        else:
            text = str(error)
        self._say(f"not connected: {text}", logging.WARNING)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        """Logs a state once, not each time it is met again."""
        if text != self._said:
            self._said = text
            log.log(level, "%s: %s", self.partition.name, text)


def jitter() -> float:
    """Keeps the partitions of many processes from calling at the same moment."""
    return random.uniform(0.75, 1.25)  # noqa: S311 (not secret)
