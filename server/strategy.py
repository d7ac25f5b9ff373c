"""The rounds of a run: what to ask, what to make of the replies, when to stop."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from common.config import Federation
from common.messages import Proposal, Reason, request
from common.statement import Signed
from server.aggregation import Aggregation, NotFiniteError, record
from server.attendance import Attendance
from server.checkpoint import Arrays, Checkpoint
from server.history import History
from server.nodes import Nodes
from server.outcome import RunError
from server.replies import Failed, Refused, Update, one_line, read
from server.statements import Witness

_LOG = logging.getLogger(__name__)
_EMPTY = 3  # tries in a row without an update end the run

Measure = Callable[[Arrays], tuple[float | None, float | None]]


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What happened in a round, over all its tries."""

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    trained: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tries: int = 0

    def seconds(self) -> float:
        return (datetime.now(UTC) - self.started).total_seconds()


class Strategy:
    """Takes a run from its checkpoint to its end, and the checkpoint with it."""

    def __init__(
        self,
        config: Federation,
        attendance: Attendance,
        nodes: Nodes,
        checkpoint: Checkpoint,
        history: History,
        *,
        measure: Measure,
    ) -> None:
        self._config, self._attendance, self._nodes = config, attendance, nodes
        self._checkpoint, self._history, self._measure = checkpoint, history, measure
        self._witness = Witness(run=checkpoint.run, task=config.task, public_keys=config.server.public_keys)
        self._shapes = {name: array.shape for name, array in checkpoint.arrays.items()}

    def run(self) -> str:
        """Why the run ended: "completed" or "exhausted". Raises RunError if it cannot go on."""
        self._attendance.connected()  # says that this run is the one
        if self._checkpoint.round < self._config.rounds:
            self._attendance.wait_for_the_first()
        while self._checkpoint.round < self._config.rounds:
            if not self._round():
                return "exhausted"
        return "completed"

    def _round(self) -> bool:
        """One more completed round; False if nobody has budget left."""
        number, tally = self._checkpoint.round + 1, _Tally()
        while not tally.trained:
            candidates = self._attendance.candidates()
            if not candidates:
                return self._nobody(number)
            if tally.tries == _EMPTY:
                raise RunError(f"round {number}: {_EMPTY} tries without an update: {_why(tally)}")
            tally.tries += 1
            aggregation = self._ask(number, tally, candidates)
            if tally.trained:
                self._finish(number, tally, aggregation)
            else:
                _LOG.warning("round %d: no update: %s", number, _why(tally))
            self._checkpoint.save(self._config.server.state)
        return True

    def _ask(self, number: int, tally: _Tally, candidates: dict[str, int]) -> Aggregation:
        """Send the model to a sample of the candidates and take in what comes back."""
        started = time.monotonic()
        sample = self._attendance.sample(number, tally.tries, candidates)
        arrays = record(self._checkpoint.arrays)
        questions = {partition: request(arrays, self._proposal(number, partition)) for partition in sample}
        aggregation = Aggregation(self._config, self._checkpoint)
        seconds = self._config.round_deadline_seconds
        for partition, message in self._nodes.ask(questions, candidates, group=str(number), seconds=seconds):
            anchor = self._checkpoint.anchor(partition)
            reply = read(message, partition, anchor=anchor, shapes=self._shapes, witness=self._witness)
            self._take(partition, reply, tally, aggregation)
        self._checkpoint.seconds += time.monotonic() - started
        return aggregation

    def _take(self, partition: str, reply: Update | Refused | Failed, tally: _Tally, aggregation: Aggregation) -> None:
        member = self._checkpoint.member(partition)
        if isinstance(reply, Failed):
            tally.failed[partition] = reply.reason
            _LOG.warning("round %d: %s failed: %s", self._checkpoint.round + 1, partition, reply.reason)
            return
        if reply.standing:
            self._checkpoint.note(reply.standing)
            member.exhausted = reply.standing.rounds_remaining == 0
        if isinstance(reply.statement, Signed):
            member.statement = reply.statement.dumps()
        elif reply.statement:
            _LOG.warning("%s: its signed statement is dropped: %s", partition, one_line(str(reply.statement)))
        if isinstance(reply, Refused):
            member.refusals += 1
            member.exhausted = member.exhausted or reply.reason is Reason.BUDGET
            tally.refused[partition] = str(reply.reason)
            _LOG.info("%s refused: %s (%s)", partition, reply.reason, reply.detail)
        else:
            aggregation.add(partition, reply)
            tally.trained.append(partition)

    def _finish(self, number: int, tally: _Tally, aggregation: Aggregation) -> None:
        started = time.monotonic()
        try:
            aggregation.finish(number)
        except NotFiniteError as error:
            tally.failed |= dict.fromkeys(tally.trained, one_line(str(error)))
            tally.trained.clear()
            return
        for partition in tally.trained:
            self._checkpoint.member(partition).rounds_trained += 1
        accuracy, loss = self._measure(self._checkpoint.arrays)
        members = sorted(self._checkpoint.members.items())
        self._checkpoint.round = number
        self._checkpoint.seconds += time.monotonic() - started
        # Before the checkpoint: a line without its checkpoint is dropped, a missing one could not be made again.
        self._history.append(
            {
                "round": number,
                "started": tally.started.isoformat(timespec="milliseconds"),
                "seconds": round(tally.seconds(), 3),
                "trained": sorted(tally.trained),
                "refused": tally.refused,
                "failed": tally.failed,
                "test_accuracy": accuracy,
                "test_loss": loss,
                "partitions": {name: member.budget() for name, member in members if member.standing},
            }
        )
        _LOG.info(
            "round %d of %d: %d trained, %d refused, %d failed, accuracy %s, loss %s, %.1f s",
            number,
            self._config.rounds,
            len(tally.trained),
            len(tally.refused),
            len(tally.failed),
            *("none" if figure is None else f"{figure:.4f}" for figure in (accuracy, loss)),
            tally.seconds(),
        )

    def _proposal(self, number: int, partition: str) -> Proposal:
        anchor = self._checkpoint.anchor(partition)
        return Proposal(
            task=self._config.task,
            round=number,
            steps=self._config.steps_per_round,
            learning_rate=self._config.learning_rate,
            anchor_sequence=anchor.sequence,
            anchor_head=anchor.head,
            run=self._checkpoint.run,
        )

    def _nobody(self, number: int) -> bool:
        """Nobody is left to ask, and nobody is expected."""
        spent = self._attendance.exhausted()
        if not spent or self._attendance.connected().keys() - spent:
            raise RunError(
                f"round {number}: no partition with budget is connected (start the clients again;"
                f" budget spent: {', '.join(spent) or 'none'})"
            )
        _LOG.info("round %d: every budget is spent: %s", number, ", ".join(spent))
        return False


def _why(tally: _Tally) -> str:
    return "; ".join(f"{name}: {why}" for name, why in sorted((tally.refused | tally.failed).items()))
