"""Attack: epsilon, delta, noise, rate, clip, steps as negative, zero, NaN, infinite, huge or of a wrong type, in the
owner's policy by mistake and in the server's messages on purpose.

What holds: a value is taken as it is and in range, or it is one line that names it; nothing is charged or created.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from client import accounting
from client.accounting import Release
from client.policy import Refused, accept, worst_round
from common.config import ConfigError, Partition, Policy, Privacy, Training, parse
from common.messages import MessageError, Proposal, Reason
from tests.federation import ROOT
from tests.hostile.liar import BROKEN, RIGGED, Liar
from tests.test_config import POLICY, changed
from tests.test_policy import from_the_wire, proposal

NAN, INF = math.nan, math.inf
ANYTHING = st.one_of(
    st.floats(), st.floats(0, 10), st.integers(), st.integers(-2, 1000), st.integers(2**60, 2**400), st.booleans(),
    st.none(), st.text(max_size=8), st.sampled_from(["8", "1e-5", "nan", "inf"]), st.binary(max_size=4),
    st.lists(st.floats(), max_size=2), st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
)  # fmt: skip
TERMS = ("epsilon", "delta", "noise_multiplier", "max_grad_norm", "batch_size", "records", "max_steps_per_round")
COUNTS = ("batch_size", "records", "max_steps_per_round")


# From the policy


def any_policy(parse: Callable[..., Policy]) -> None:
    @settings(max_examples=400, deadline=None, database=None, report_multiple_bugs=False)
    @given(key=st.sampled_from(TERMS), value=ANYTHING)
    def is_taken_or_refused(key: str, value: Any) -> None:
        found = ""
        try:
            privacy = parse(Policy, changed(POLICY, f"privacy.{key}", value), source="policy.yaml").privacy
        except ConfigError as error:
            found = str(error)
        if found:
            assert found.startswith("policy.yaml: privacy.")
            assert len(found.splitlines()) == 1
            return
        assert type(value) in (int, float), "a wrong type was taken"
        assert getattr(privacy, key) == value, "it was changed silently"
        assert 0 < privacy.epsilon < INF, "out of range"
        assert 0 < privacy.delta < 1 / privacy.records, "out of range"
        assert 0.01 <= privacy.noise_multiplier <= 1e6, "out of range"
        assert 0 < privacy.max_grad_norm < INF, "out of range"
        assert all(type(getattr(privacy, name)) is int and 1 <= getattr(privacy, name) <= 10**9 for name in COUNTS)
        assert 0 < privacy.sample_rate <= 1, "out of range"
        worst_round(privacy)

    is_taken_or_refused()


def test_any_value_of_the_policy_is_taken_as_it_is_or_refused() -> None:
    any_policy(parse)


def test_a_policy_that_is_not_checked_is_seen() -> None:
    """Negative control."""

    def unchecked(_: type, content: dict[str, Any], source: str) -> Policy:  # noqa: ARG001 (as parse)
        privacy = Privacy.model_construct(accounting="fixed", **content["privacy"])
        return Policy.model_construct(privacy=privacy, training=Training(), partitions=[Partition(name="a")])

    with pytest.raises((AssertionError, TypeError, ValueError, ArithmeticError)):
        any_policy(unchecked)


@pytest.mark.parametrize(
    ("key", "text"),
    [("epsilon", ".nan"), ("delta", "1e-5"), ("noise_multiplier", "-.inf"), ("batch_size", "64.0"), ("epsilon", "-8")],
)
def test_no_program_starts_on_nonsense(tmp_path: Path, key: str, text: str) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(changed(POLICY, f"privacy.{key}", "HERE")).replace("HERE", text))
    name = POLICY["partitions"][0]["name"]
    ledger = tmp_path / "state/clients" / name / "ledger.jsonl"
    for command in (["client"], ["client.ledger", "create", str(ledger), "--partition", name]):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--policy", str(policy)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode in (1, 2)
        assert done.stderr.startswith(f"{policy}: privacy.{key}: ")
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [policy]


@settings(max_examples=100, deadline=None)
@given(noise=ANYTHING, rate=ANYTHING, steps=ANYTHING)
def test_no_charge_of_nonsense_can_be_made(noise: Any, rate: Any, steps: Any) -> None:
    for values in ((noise, 0.1, 10), (1.0, rate, 10), (1.0, 0.1, steps)):
        try:
            charge = Release(noise_multiplier=values[0], sample_rate=values[1], steps=values[2])
        except ValueError:
            continue
        assert 0.01 <= charge.noise_multiplier <= 1e6
        assert 1e-9 <= charge.sample_rate <= 1
        assert 1 <= charge.steps <= 10**9
        assert accounting.epsilon("adaptive", accounting.compose([charge]), 1e-5) >= 0  # so not NaN


# From the wire

OWNER = parse(Policy, changed(POLICY, "training.max_learning_rate", 100.0), source="test")


def any_proposal(accept: Callable[[Proposal, Policy], Release]) -> None:
    @settings(max_examples=300, deadline=None, database=None, report_multiple_bugs=False)
    @given(
        steps=st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 20),
        rate=st.floats(width=64) | st.floats(0, 200),
        round_=st.integers(-(2**63), 2**63 - 1),
        task=st.just("digits") | st.text(max_size=20),
    )
    def is_in_range_or_refused(steps: int, rate: float, round_: int, task: str) -> None:
        wanted = proposal(steps=steps, learning_rate=rate, round=round_, task=task)
        if 1 <= steps <= 12 and 0 < rate <= 100.0 and task == "digits":
            assert accept(wanted, OWNER) == Release(noise_multiplier=1.5, sample_rate=64 / 718, steps=steps)
            return
        with pytest.raises(Refused) as caught:
            accept(wanted, OWNER)
        assert caught.value.reason == Reason.POLICY
        assert "\n" not in caught.value.detail

    is_in_range_or_refused()


def test_any_proposal_is_in_range_or_refused() -> None:
    any_proposal(accept)


def test_a_client_that_accepts_anything_is_seen() -> None:
    """Negative control: it takes the terms of the owner, and the steps of the server."""
    privacy = OWNER.privacy

    def anything(wanted: Proposal, _: Policy) -> Release:
        return Release(noise_multiplier=privacy.noise_multiplier, sample_rate=privacy.sample_rate, steps=wanted.steps)

    with pytest.raises((pytest.fail.Exception, ValueError)):
        any_proposal(anything)


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
        accept(from_the_wire(**{key: value}), OWNER)
    assert caught.value.reason == Reason.POLICY
    assert caught.value.detail.startswith(expected)
    assert caught.value.detail.endswith(f"asked for {value!r}") or key == "task"
    assert len(caught.value.detail) < 300
    assert "\n" not in caught.value.detail


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


NONSENSE: dict[str, dict[str, Any]] = {
    "no steps": {"steps": 0},
    "negative steps": {"steps": -4},
    "steps beyond count": {"steps": 2**62},
    "steps as a float": {"steps": 2.0},
    "steps as a truth": {"steps": True},
    "steps as a text": {"steps": "2"},
    "steps as a list": {"steps": [2]},
    "no number of steps": {"steps": None},
    "rate nan": {"learning_rate": NAN},
    "rate inf": {"learning_rate": INF},
    "rate -inf": {"learning_rate": -INF},
    "rate zero": {"learning_rate": 0.0},
    "rate negative": {"learning_rate": -16.0},
    "rate too large": {"learning_rate": 1000.1},
    "rate as an int": {"learning_rate": 16},
    "round as a text": {"round": "1"},
    "anchor as a text": {"anchor_sequence": "0"},
    "head as a number": {"anchor_head": 0},
    "a long task": {"task": "\x1b[2J\n" * 10_000},
    "epsilon nan": {"epsilon": NAN},
    "delta of one": {"delta": 1.0},
    "noise nan": {"noise_multiplier": NAN},
    "negative noise": {"noise_multiplier": -1.0},
    "no clip": {"max_grad_norm": 0.0},
    "rate of two": {"sample_rate": 2.0},
}


@pytest.mark.parametrize("changes", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_from_a_server_is_refused_and_costs_nothing(liar: Liar, changes: dict[str, Any]) -> None:
    detail = liar.refuses(RIGGED, liar.honest(**changes), "policy")
    assert set(changes) & set(detail.replace(":", " ").split()) or "expected a record of" in detail


@pytest.mark.parametrize("changes", [{"learning_rate": NAN}, {"noise_multiplier": NAN}], ids=["rate", "noise"])
def test_a_client_that_obeys_nonsense_is_seen(liar: Liar, changes: dict[str, Any]) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="ledger sequence and records read were"):
        liar.refuses(BROKEN, liar.honest(**changes), "policy")
