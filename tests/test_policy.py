"""The owner's terms bind: a proposal at their edge is taken, one beyond it, or not of its type, is refused."""

import math
from dataclasses import asdict, fields
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(max_examples=300, deadline=None)
@given(
    steps=st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 20),
    rate=st.floats(width=64) | st.floats(0, 200),
    round_=st.integers(-(2**63), 2**63 - 1),
    task=st.just("digits") | st.text(max_size=20),
)
def test_any_proposal_is_in_range_or_refused(steps: int, rate: float, round_: int, task: str) -> None:
    wanted = proposal(steps=steps, learning_rate=rate, round=round_, task=task)
    fits = 1 <= steps <= 12 and 0 < rate <= 100.0 and task == "digits"
    if fits:
        assert accept(wanted, POLICY) == Release(noise_multiplier=1.5, sample_rate=64 / 718, steps=steps)
        return
    with pytest.raises(Refused) as caught:
        accept(wanted, POLICY)
    assert caught.value.reason == Reason.POLICY
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("steps", 0, "steps: expected 1 to 12, asked for 0"),
        ("steps", 13, "steps: expected 1 to 12, asked for 13"),
        ("steps", -1, "steps: expected 1 to 12, asked for -1"),
        ("steps", 2**62, "steps: expected 1 to 12"),
        ("learning_rate", 0.0, "learning_rate: expected "),
        ("learning_rate", -0.0, "learning_rate: expected "),
        ("learning_rate", -1.0, "learning_rate: expected "),
        ("learning_rate", math.nextafter(100.0, 101), "learning_rate: expected "),
        ("learning_rate", 1e308, "learning_rate: expected "),
        ("learning_rate", math.nan, "learning_rate: expected "),
        ("learning_rate", math.inf, "learning_rate: expected "),
        ("learning_rate", -math.inf, "learning_rate: expected "),
        ("task", "cifar10", "task: this client serves digits, asked for 'cifar10'"),
        ("task", "", "task: "),
        ("task", "x" * 10**6, "task: "),
        ("task", "a\nb", "task: this client serves digits, asked for 'a\\nb'"),
    ],
)
def test_out_of_range_is_refused_also_from_the_wire(key: str, value: Any, expected: str) -> None:
    with pytest.raises(Refused) as caught:
        accept(from_the_wire(**{key: value}), POLICY)
    assert caught.value.reason == Reason.POLICY
    assert caught.value.detail.startswith(expected)
    assert caught.value.detail.endswith(f"asked for {value!r}") or key == "task"
    assert len(caught.value.detail) < 300
    assert "\n" not in caught.value.detail


def test_a_run_may_have_a_name_that_is_safe_to_keep() -> None:
    """It ends in the ledger and in the signed statement; it decides nothing."""
    for name in ("", "20260101T000000Z-abcdef", "x" * 64):
        assert accept(from_the_wire(run=name), POLICY) == accept(from_the_wire(), POLICY)
    for name in ("x" * 65, "two words", "a\nb", "a\n", "../up", "\x1b[31m", "ü"):
        with pytest.raises(Refused, match="run: expected a name of at most 64"):
            accept(from_the_wire(run=name), POLICY)
    with pytest.raises(MessageError, match="expected run as str"):
        from_the_wire(run=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", True), ("steps", 12.0), ("steps", "12"), ("steps", [12]), ("steps", b"12"),
        ("learning_rate", True), ("learning_rate", 1), ("learning_rate", "1.0"), ("learning_rate", [1.0]),
        ("round", False), ("round", 1.0), ("task", b"digits"), ("task", ["digits"]), ("task", 1),
        ("anchor_sequence", True), ("anchor_sequence", 0.0), ("anchor_head", 0), ("anchor_head", b""),
    ],
)  # fmt: skip
def test_a_wrong_type_from_the_wire_is_refused(key: str, value: Any) -> None:
    with pytest.raises(MessageError, match=f"expected {key} as "):
        from_the_wire(**{key: value})


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
