"""The owner's terms bind: a proposal at their edge is taken, one beyond it, or not of its type, is refused."""

from dataclasses import asdict, fields
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.accounting import Release
from client.policy import Refused, accept, worst_round
from common import messages
from common.config import Policy, parse
from common.messages import MessageError, Proposal, Reason, Refusal, Standing

POLICY = parse(
    Policy,
    {
        "privacy": {
            "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.5, "max_grad_norm": 0.5,
            "batch_size": 64, "records": 718, "max_steps_per_round": 12,
        },
        "training": {"max_learning_rate": 100.0},
        "partitions": [{"name": "a"}],
    },
    source="test",
)  # fmt: skip
GOOD: dict[str, Any] = {
    "task": "digits", "round": 1, "steps": 12, "learning_rate": 16.0, "anchor_sequence": 0, "anchor_head": "",
}  # fmt: skip


def proposal(**changes: Any) -> Proposal:
    return Proposal(**{**GOOD, **changes})


def from_the_wire(**changes: Any) -> Proposal:
    """What a server's record becomes, through the bytes that travel."""
    sent = RecordDict({"config": ConfigRecord({**GOOD, **changes})})
    config = sent["config"]
    assert isinstance(config, ConfigRecord)
    inflated = ConfigRecord.inflate(config.deflate())
    return Proposal.from_record(inflated)


# What is released is the owner's, whatever was asked


@pytest.mark.parametrize("steps", [1, 2, 11, 12])
def test_steps_in_range_are_taken(steps: int) -> None:
    assert accept(proposal(steps=steps), POLICY) == Release(noise_multiplier=1.5, sample_rate=64 / 718, steps=steps)


@pytest.mark.parametrize("rate", [5e-324, 1e-3, 100.0])
def test_learning_rates_in_range_are_taken(rate: float) -> None:
    accept(proposal(learning_rate=rate), POLICY)


def test_the_worst_round() -> None:
    assert worst_round(POLICY.privacy) == accept(proposal(steps=12), POLICY)


def test_a_run_may_have_a_name_that_is_safe_to_keep() -> None:
    """It ends in the ledger and in the signed statement; it decides nothing."""
    for name in ("", "20260101T000000Z-abcdef", "x" * 64):
        assert accept(from_the_wire(run=name), POLICY) == accept(from_the_wire(), POLICY)
    for name in ("x" * 65, "two words", "a\nb", "a\n", "../up", "\x1b[31m", "ü"):
        with pytest.raises(Refused, match="run: expected a name of at most 64"):
            accept(from_the_wire(run=name), POLICY)
    with pytest.raises(MessageError, match="expected run as str"):
        from_the_wire(run=1)


def test_a_server_may_ask_for_a_smaller_update_in_a_form_that_is_known() -> None:
    for form in ("none", "int8"):
        assert accept(from_the_wire(compression=form), POLICY) == accept(from_the_wire(), POLICY)
    for form in ("", "int4", "INT8", "x" * 10**4):
        with pytest.raises(Refused, match="compression: expected none, int8, asked for") as refused:
            accept(from_the_wire(compression=form), POLICY)
        assert len(refused.value.detail) < 200
    with pytest.raises(MessageError, match="expected compression as str"):
        from_the_wire(compression=8)


def test_what_has_its_default_does_not_travel() -> None:
    """A client from before a key takes part until the key is used."""
    assert set(proposal().to_record()) == set(GOOD)
    assert set(proposal(compression="int8", run="one").to_record()) == {*GOOD, "compression", "run"}


@pytest.mark.parametrize("extra", ["noise_multiplier", "max_grad_norm", "batch_size", "epsilon", "reset"])
def test_a_server_cannot_add_terms_of_its_own(extra: str) -> None:
    with pytest.raises(MessageError, match="expected a record of"):
        from_the_wire(**{extra: 0.1})


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_a_missing_key_is_refused(missing: str) -> None:
    with pytest.raises(MessageError, match="expected a record of"):
        Proposal.from_record(ConfigRecord({name: value for name, value in GOOD.items() if name != missing}))


@pytest.mark.parametrize("record", [None, {}, GOOD, ArrayRecord(), MetricRecord({"steps": 1}), 3])
def test_what_is_no_config_record_is_refused(record: Any) -> None:
    with pytest.raises(MessageError, match="expected a record of"):
        Proposal.from_record(record)


# The records of the protocol


def test_each_record_survives_the_wire() -> None:
    standing = Standing(
        partition="a", epsilon_spent=1.5, epsilon_budget=8.0, delta=1e-5, rounds_remaining=3, ledger_sequence=4,
        ledger_head="f" * 64,
    )  # fmt: skip
    for record in (proposal(), standing, Refusal(reason="policy", detail="no")):
        inflated = ConfigRecord.inflate(record.to_record().deflate())
        assert type(record).from_record(inflated) == record
        assert set(asdict(record)) == {field.name for field in fields(record)}


def test_a_refusal_carries_no_arrays_and_no_weight() -> None:
    content = messages.refusal(Reason.BUDGET, "spent", None)
    assert set(content) == {messages.REFUSAL}
    assert dict(content[messages.REFUSAL]) == {"reason": "budget_exhausted", "detail": "spent"}
