"""What travels between server and client, as Flower records.

Request:  arrays = the global model's trainable parameters, config = a `Proposal`.
Reply:    arrays = the noised local parameters, as common.compression packs them, metrics = the public weight, config =
          a `Standing`; or config = a `Refusal` and its `Standing`. Nothing in a reply depends on the data but the
          noised parameters.
          Beside a standing travels its signed statement (common.statement), where the client could make one.
"""

import hashlib
from dataclasses import MISSING, asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

ARRAYS, CONFIG, METRICS, REFUSAL, STANDING = "arrays", "config", "metrics", "refusal", "standing"
STATEMENT, SIGNED = "statement", "signed"
WEIGHT = "weight"


class Reason(StrEnum):
    """Why a client did not train. Each is a label of `fl_privacy_refusals_total`."""

    BUDGET = "budget_exhausted"  # the round's worst case does not fit in what is left
    POLICY = "policy"  # the proposal is outside the owner's terms
    LEDGER = "ledger"  # the ledger cannot be trusted or written
    ROLLBACK = "rollback"  # the ledger is behind what the server has seen
    DUPLICATE = "duplicate"  # this message was charged before
    MODEL = "model"  # the parameters do not fit the client's own model, or that model is not private
    DATA = "data"  # the client's data cannot be read
    MEMORY = "memory"  # there is no room for a step now, on the GPU or the CPU


class MessageError(ValueError):
    """A record does not hold what it must."""


class _Record:
    """A frozen dataclass that is a ConfigRecord on the wire; types are checked, unknown keys are refused.

    A field with a default may be absent, and is where it has that value: peers that do not know it need not.
    """

    def to_record(self) -> ConfigRecord:
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        content = {name: value for name, value in asdict(self).items() if value != defaults[name]}  # type: ignore[call-overload]
        return ConfigRecord(content)

    @classmethod
    def from_record(cls, record: Any) -> Self:
        names: dict[str, Any] = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
        needed = {field.name for field in fields(cls) if field.default is MISSING}  # type: ignore[arg-type]
        if not isinstance(record, ConfigRecord) or not needed <= set(record) <= set(names):
            raise MessageError(f"expected a record of {sorted(names)}")
        for name in record:
            wanted = names[name]
            if type(record[name]) is not wanted:
                raise MessageError(f"expected {name} as {wanted.__name__}, found {type(record[name]).__name__}")
        return cls(**record)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal(_Record):
    """What the server asks for in one round."""

    task: str
    round: int
    steps: int  # optimiser steps, not epochs
    learning_rate: float
    anchor_sequence: int  # newest ledger head the server has seen from this partition; 0: none
    anchor_head: str
    run: str = ""  # the server's name for the run, which ledger and statement show; empty: it has none
    compression: str = "none"  # of the update: a `Compression` of common.config


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing(_Record):
    """Where a partition's budget stands after this message. All of it follows from public constants."""

    partition: str
    epsilon_spent: float
    epsilon_budget: float
    delta: float
    rounds_remaining: int  # full rounds under the owner's terms
    ledger_sequence: int
    ledger_head: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal(_Record):
    """A typed no, sent before any record was read."""

    reason: str  # a `Reason`
    detail: str  # one line for a person


def request(arrays: ArrayRecord, proposal: Proposal) -> RecordDict:
    """The content of one training message."""
    return RecordDict({ARRAYS: arrays, CONFIG: proposal.to_record()})


def update(arrays: ArrayRecord, standing: Standing, *, weight: float) -> RecordDict:
    """The content of a reply that carries a noised update."""
    return RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: weight}), STANDING: standing.to_record()})


def refusal(reason: Reason, detail: str, standing: Standing | None) -> RecordDict:
    """The content of a reply that carries none. No standing where the ledger cannot be read."""
    records = RecordDict({REFUSAL: Refusal(reason=str(reason), detail=detail).to_record()})
    if standing is not None:
        records[STANDING] = standing.to_record()
    return records


def statement(signed: str) -> ConfigRecord:
    """The record of a signed statement, as `common.statement.Signed.dumps` wrote it."""
    return ConfigRecord({SIGNED: signed})


def digest(arrays: ArrayRecord) -> str:
    """SHA-256 over the arrays' names, types, shapes and values, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        value = np.asarray(arrays[name].numpy(), order="C")
        found.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        found.update(value.reshape(-1).view(np.uint8).data)
    return found.hexdigest()
