"""What a hostile client may send: each lie is one failed reply, never a crash, never an update."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from common.messages import Reason
from server.checkpoint import Anchor
from server.replies import Failed, Refused, Update, read
from tests.fake_grid import FakeGrid

SHAPES = {"weight": (3, 2), "bias": (3,), "scale": ()}
ANCHOR = Anchor(sequence=10, head="ten")


def standing(**changes: Any) -> ConfigRecord:
    content = {
        "partition": "a", "epsilon_spent": 1.0, "epsilon_budget": 3.0, "delta": 1e-5, "rounds_remaining": 5,
        "ledger_sequence": 12, "ledger_head": "twelve",
    }  # fmt: skip
    return ConfigRecord(content | changes)


def content(**changes: Any) -> RecordDict:
    """An honest update, with some of its records replaced."""
    arrays = ArrayRecord({name: Array(np.ones(shape, np.float32)) for name, shape in SHAPES.items()})
    records = {"arrays": arrays, "metrics": MetricRecord({"weight": 1.0}), "standing": standing()}
    return RecordDict({name: record for name, record in (records | changes).items() if record is not None})


def arrays(**changes: Any) -> RecordDict:
    made = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()} | changes
    given = {name: a if isinstance(a, Array) else Array(a) for name, a in made.items() if a is not None}
    return content(arrays=ArrayRecord(given))


def claims(shape: tuple[int, ...]) -> Array:
    """Twelve bytes that say they are an array of this shape."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return Array("float32", (3,), "numpy.ndarray", stream.getvalue() + bytes(12))


def reply(content: RecordDict | Error) -> Message:
    FakeGrid({})  # gives this process the identity that a message needs
    return Message(content, reply_to=Message(RecordDict(), dst_node_id=7, message_type="train"))


def parse(records: RecordDict | Error) -> Update | Refused | Failed:
    return read(reply(records), "a", anchor=ANCHOR, shapes=SHAPES)


def test_an_honest_update_is_one() -> None:
    update = parse(content())
    assert isinstance(update, Update)
    assert update.weight == 1.0
    assert update.standing.ledger_head == "twelve"


@pytest.mark.parametrize(
    ("lie", "found"),
    {
        "another shape": (lambda: arrays(bias=np.ones(4, np.float32)), "bias: expected float32 of shape"),
        "a shape that broadcasts": (lambda: arrays(bias=np.ones(1, np.float32)), "bias: expected"),
        "another type": (lambda: arrays(bias=np.ones(3)), "bias: expected float32 .*, found float64"),
        "objects": (lambda: arrays(bias=Array("object", (3,), "numpy.ndarray", b"\x93NUMPY\x01\x00")), "header"),
        "not NumPy": (lambda: arrays(bias=Array("float32", (3,), "numpy.ndarray", b"rubbish")), "magic"),
        "another serializer": (
            lambda: arrays(bias=Array("float32", (3,), "pickle", Array(np.ones(3, np.float32)).data)), "pickle"),
        "terabytes": (lambda: arrays(bias=claims((10**12,))), r"found float32 of \(1000000000000,\)"),
        "too few bytes": (lambda: arrays(weight=claims((3, 2))), "."),
        "NaN": (lambda: arrays(bias=np.float32([1, math.nan, 1])), "bias: expected finite"),
        "infinity": (lambda: arrays(weight=np.full((3, 2), -np.inf, np.float32)), "weight: expected finite"),
        "one array missing": (lambda: arrays(bias=None), "expected the 3 arrays"),
        "one array more": (lambda: arrays(more=np.ones(3, np.float32)), "expected the 3 arrays"),
        "no arrays": (lambda: content(arrays=None), "expected arrays, metrics and standing"),
        "a record more": (lambda: content(more=ConfigRecord({"loss": 0.1})), "expected arrays, metrics and standing"),
        "weight 0": (lambda: content(metrics=MetricRecord({"weight": 0.0})), "expected weight above 0"),
        "a negative weight": (lambda: content(metrics=MetricRecord({"weight": -1.0})), "expected weight above 0"),
        "a huge weight": (lambda: content(metrics=MetricRecord({"weight": 1e300})), "at most 1e.09, found 1e.300"),
        "weight NaN": (lambda: content(metrics=MetricRecord({"weight": math.nan})), "expected weight above 0"),
        "weights": (lambda: content(metrics=MetricRecord({"weight": [1.0]})), "expected weight"),
        "a metric more": (lambda: content(metrics=MetricRecord({"weight": 1.0, "loss": 0.1})), "expected one metric"),
        "another's name": (lambda: content(standing=standing(partition="b")), "standing of a, found one of 'b'"),
        "no standing": (lambda: content(standing=None), "expected a record of"),
        "a standing without a head": (lambda: content(standing=ConfigRecord({"partition": "a"})), "expected a record"),
        "an older ledger": (lambda: content(standing=standing(ledger_sequence=9)), "a ledger beyond 10, found 9"),
        "an unpaid update": (lambda: content(standing=standing(ledger_sequence=10)), "a ledger beyond 10, found 10"),
        "epsilon NaN": (lambda: content(standing=standing(epsilon_spent=math.nan)), "expected finite figures"),
        "a negative budget": (lambda: content(standing=standing(epsilon_budget=-1.0)), "expected finite figures"),
        "negative rounds": (lambda: content(standing=standing(rounds_remaining=-1)), "expected counts"),
        "a novel as head": (lambda: content(standing=standing(ledger_head="x" * 9999)), "at most 200 characters"),
        "an unknown reason": (
            lambda: RecordDict({"refusal": ConfigRecord({"reason": "whim", "detail": ""})}), "expected a reason"),
        "a refusal of another shape": (lambda: RecordDict({"refusal": ConfigRecord({"reason": 1})}), "expected a reco"),
        "an error": (lambda: Error(3, "line\n\x1b[31mline"), r"^error 3: line \[31mline$"),
        "an error without end": (lambda: Error(3, "x" * 10**6), "^error 3: x{191}$"),
    }.values(),
)  # fmt: skip
def test_a_lie_is_a_failed_reply(lie: Callable[[], RecordDict | Error], found: str) -> None:
    failed = parse(lie())
    assert isinstance(failed, Failed)
    assert re.search(found, failed.reason), failed.reason


def test_a_refusal_says_why_on_one_line() -> None:
    refusal = ConfigRecord({"reason": "policy", "detail": "steps:\n too \x1b[31m many"})
    said = parse(RecordDict({"refusal": refusal, "standing": standing()}))
    assert said == Refused(reason=Reason.POLICY, detail="steps: too [31m many", standing=said.standing)
    assert said.standing is not None


def test_the_figures_of_a_ledger_that_is_behind_are_not_taken() -> None:
    refusal = ConfigRecord({"reason": "rollback", "detail": "behind"})
    said = parse(RecordDict({"refusal": refusal, "standing": standing(ledger_sequence=4)}))
    assert said == Refused(reason=Reason.ROLLBACK, detail="behind", standing=None)
