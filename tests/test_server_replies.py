"""What a hostile client may send: each lie is one failed reply, never a crash, never an update."""

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from common import messages
from common.certificates import new_key, openssh_public
from common.config import Compression
from common.messages import Reason, Standing
from common.statement import Signed, StatementError
from server.checkpoint import Anchor
from server.parameters import Parameters
from server.replies import Failed, Refused, Update, read
from server.statements import Witness
from tests.fake_grid import FakeGrid
from tests.statements import signed

SHAPES = {"weight": (3, 2), "bias": (3,), "scale": ()}
MODEL = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}
ANCHOR = Anchor(sequence=10, head="ten")
HEAD = "c" * 64
KEY = new_key()


def standing(**changes: Any) -> ConfigRecord:
    content = {
        "partition": "a", "epsilon_spent": 1.0, "epsilon_budget": 3.0, "delta": 1e-5, "rounds_remaining": 5,
        "ledger_sequence": 12, "ledger_head": HEAD,
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


def parse(
    records: RecordDict | Error, keys: Path = Path("none"), compression: Compression = "none"
) -> Update | Refused | Failed:
    parameters = Parameters(model=MODEL, compression=compression)
    witness = Witness(run="one", task="digits", public_keys=keys)
    return read(reply(records), "a", anchor=ANCHOR, parameters=parameters, witness=witness)


def test_an_honest_update_is_one() -> None:
    update = parse(content())
    assert isinstance(update, Update)
    assert update.weight == 1.0
    assert update.standing.ledger_head == HEAD


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


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "a.pub").write_bytes(openssh_public(KEY, "a"))
    return tmp_path


def stated(key: Any = KEY, **changes: Any) -> str:
    """The text of a true statement about an honest update, or of one in which the partition lies."""
    update = messages.digest(content()["arrays"])  # type: ignore[arg-type]
    return signed(key, Standing.from_record(standing()), run="one", update=update, **changes).dumps()


def test_a_true_statement_is_taken_with_its_update(keys: Path) -> None:
    text = stated()
    update = parse(content(statement=ConfigRecord({"signed": text})), keys)
    assert isinstance(update, Update)
    assert update.statement == Signed.loads(text)


def test_a_true_statement_is_taken_with_a_refusal(keys: Path) -> None:
    text = signed(KEY, Standing.from_record(standing()), run="one", update=None).dumps()
    records = {"refusal": ConfigRecord({"reason": "policy", "detail": ""}), "standing": standing()}
    said = parse(RecordDict({**records, "statement": ConfigRecord({"signed": text})}), keys)
    assert isinstance(said, Refused)
    assert said.statement == Signed.loads(text)
    late = {**records, "standing": standing(ledger_sequence=4), "statement": ConfigRecord({"signed": text})}
    assert parse(RecordDict(late), keys) == Refused(reason=Reason.POLICY, detail="", standing=None)


@pytest.mark.parametrize(
    ("record", "found"),
    {
        "metrics": (lambda: MetricRecord({"signed": 1.0}), "expected a record with a signed statement"),
        "arrays": (lambda: ArrayRecord(), "expected a record with a signed statement"),
        "nothing": (lambda: ConfigRecord(), "expected a record with a signed statement"),
        "a number": (lambda: ConfigRecord({"signed": 1}), "expected a record with a signed statement"),
        "a key more": (lambda: ConfigRecord({"signed": stated(), "loss": 0.1}), "expected a record with a signed"),
        "bytes": (lambda: ConfigRecord({"signed": b"{}"}), "expected a record with a signed statement"),
        "no JSON": (lambda: ConfigRecord({"signed": "rubbish"}), "not JSON"),
        "depth": (lambda: ConfigRecord({"signed": "[" * 20000}), "not JSON"),
        "a novel": (lambda: ConfigRecord({"signed": "x" * 10**6}), "expected at most 32768 characters"),
        "a key twice": (lambda: ConfigRecord({"signed": '{"statement": 1, "statement": 2}'}), "twice"),
        "an epsilon that is none": (
            lambda: ConfigRecord({"signed": stated().replace('"epsilon_spent":1.0', '"epsilon_spent":NaN')}), "float"),
        "control characters": (
            lambda: ConfigRecord({"signed": stated().replace("digits", "\\u001b[31m")}), "task: String should match"),
        "another's": (lambda: ConfigRecord({"signed": stated(partition="b")}), "partition: states b"),
        "another task": (lambda: ConfigRecord({"signed": stated(task="cifar10")}), "task: states cifar10"),
        "another run": (lambda: ConfigRecord({"signed": stated(run__name="two")}), "run: states two"),
        "an older line": (lambda: ConfigRecord({"signed": stated(ledger__sequence=11)}), "ledger.sequence: states 11"),
        "another line": (lambda: ConfigRecord({"signed": stated(ledger__hash="d" * 64)}), "ledger.hash: states d"),
        "less spent": (lambda: ConfigRecord({"signed": stated(epsilon_spent=0.5)}), "epsilon_spent: states 0.5"),
        "another budget": (lambda: ConfigRecord({"signed": stated(epsilon_budget=1.0)}), "epsilon_budget: states 1"),
        "another delta": (lambda: ConfigRecord({"signed": stated(delta=1e-6)}), "delta: states 1e-06"),
        "other bytes": (lambda: ConfigRecord({"signed": stated(update_sha256="0" * 64)}), "update_sha256: states 0"),
        "another key": (lambda: ConfigRecord({"signed": stated(key=new_key())}), "signed by another key"),
        "edited": (lambda: ConfigRecord({"signed": stated().replace("1.5", "2.5")}), "the signature does not fit"),
    }.values(),
)  # fmt: skip
def test_a_false_statement_costs_itself_and_not_the_update(keys: Path, record: Callable[[], Any], found: str) -> None:
    update = parse(content(statement=record()), keys)
    assert isinstance(update, Update)
    assert isinstance(update.statement, StatementError)
    assert found in str(update.statement)


def test_without_a_key_of_the_partition_no_statement_is_taken(tmp_path: Path) -> None:
    for text in (None, "", "ssh-ed25519 AAAA", "rubbish"):
        if text is not None:
            (tmp_path / "a.pub").write_text(text)
        update = parse(content(statement=ConfigRecord({"signed": stated()})), tmp_path)
        assert isinstance(update, Update)
        assert isinstance(update.statement, StatementError)
