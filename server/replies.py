"""Reading what a client sent. Nothing in it is believed: not its name, its sizes, its numbers, nor its texts."""

import math
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from common.messages import (
    ARRAYS,
    METRICS,
    REFUSAL,
    STANDING,
    STATEMENT,
    WEIGHT,
    MessageError,
    Reason,
    Refusal,
    Standing,
    digest,
)
from common.statement import Signed, StatementError
from server.checkpoint import Anchor, Arrays
from server.parameters import Parameters
from server.statements import Witness

MAX_WEIGHT = 1e9  # keeps the sum of weights finite; weights are the owners' public constants, such as a nominal size

_MAX_TEXT = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A partition trained: its noised parameters, which fit the global model and are finite."""

    arrays: Arrays
    weight: float
    standing: Standing
    statement: Signed | StatementError | None = None  # an error: what came is none, and is dropped


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A partition said no, before reading a record."""

    reason: Reason
    detail: str
    standing: Standing | None
    statement: Signed | StatementError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """No usable reply."""

    reason: str


def read(
    message: Message, partition: str, *, anchor: Anchor, parameters: Parameters, witness: Witness
) -> Update | Refused | Failed:
    """The reply of the node that is registered as `partition`, to a server that knows its ledger up to `anchor`."""
    if message.has_error():
        return Failed(reason=one_line(f"error {message.error.code}: {message.error.reason}"))
    content = message.content
    try:
        if REFUSAL in content:
            return _refused(content, partition, anchor, witness)
        standing = _standing(content.get(STANDING), partition)
        # A client pays before it trains, so an update's ledger is ahead of the one that was known before.
        if standing.ledger_sequence <= anchor.sequence:
            raise MessageError(f"expected a ledger beyond {anchor.sequence}, found {standing.ledger_sequence}")
        if set(content) - {STATEMENT} != {ARRAYS, METRICS, STANDING}:
            raise MessageError(f"expected arrays, metrics and standing, found {sorted(content)}")
        arrays, weight = parameters.read(content[ARRAYS]), _weight(content[METRICS])
        statement = _statement(content, standing, witness, content[ARRAYS])  # type: ignore[arg-type]
        return Update(arrays=arrays, weight=weight, standing=standing, statement=statement)
    # Besides ours, whatever Flower and NumPy raise about bytes that are not what they should be.
    except (ValueError, TypeError, KeyError, OSError, EOFError, MemoryError) as error:
        return Failed(reason=one_line(str(error) or repr(error)))


def one_line(text: str | None) -> str:
    """A client's text as something that can be logged: printable, on one line, not long."""
    line = " ".join((text or "").split())
    return "".join(letter for letter in line if letter.isprintable())[:_MAX_TEXT]


def _refused(content: RecordDict, partition: str, anchor: Anchor, witness: Witness) -> Refused:
    refusal = Refusal.from_record(content[REFUSAL])
    if refusal.reason not in list(Reason):
        raise MessageError(f"expected a reason among {', '.join(Reason)}, found {refusal.reason!r}")
    standing = _standing(content[STANDING], partition) if STANDING in content else None
    if standing and standing.ledger_sequence < anchor.sequence:
        standing = None  # a ledger that is behind says so by refusing; its figures are out of date
    statement = _statement(content, standing, witness) if standing else None
    return Refused(
        reason=Reason(refusal.reason), detail=one_line(refusal.detail), standing=standing, statement=statement
    )


def _statement(
    content: RecordDict, standing: Standing, witness: Witness, arrays: ArrayRecord | None = None
) -> Signed | StatementError | None:
    """What came signed with the standing. The round does not depend on it: a false one costs itself, not the update."""
    if STATEMENT not in content:
        return None
    try:
        return witness.take(content[STATEMENT], standing, update=digest(arrays) if arrays is not None else None)
    except StatementError as error:
        return error


def _standing(record: object, partition: str) -> Standing:
    standing = Standing.from_record(record)
    if standing.partition != partition:
        raise MessageError(f"expected the standing of {partition}, found one of {standing.partition!r}")
    figures = (standing.epsilon_spent, standing.epsilon_budget, standing.delta)
    if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
        raise MessageError(f"expected finite figures of at least 0, found {figures}")
    if min(standing.rounds_remaining, standing.ledger_sequence) < 0:
        raise MessageError("expected counts of at least 0")
    if len(standing.ledger_head) > _MAX_TEXT:
        raise MessageError(f"expected a ledger head of at most {_MAX_TEXT} characters")
    return standing


def _weight(record: object) -> float:
    if not isinstance(record, MetricRecord) or set(record) != {WEIGHT}:
        raise MessageError(f"expected one metric, {WEIGHT}")
    weight = record[WEIGHT]
    if not isinstance(weight, float) or not 0 < weight <= MAX_WEIGHT:
        raise MessageError(f"expected {WEIGHT} above 0 and at most {MAX_WEIGHT:g}, found {weight}")
    return weight
