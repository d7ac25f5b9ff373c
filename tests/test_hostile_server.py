"""A server that lies: no message of it makes a client read a record, charge its ledger, or run foreign code."""

import base64
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.proto.fab_pb2 import GetFabRequest

from client.app import Bench
from client.fleet import Fleet, FleetError, Node
from client.policy import Refused
from common.tasks import TaskError, load_task
from tests.federation import Federation, metrics
from tests.hostile.liar import HONEST, RIGGED, SPARE, Liar, array, lying, weights

HERE = Path(__file__).parent / "hostile"


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Liar]:
    with lying(tmp_path_factory.mktemp("hostile")) as made:
        yield made


NAN, INF = float("nan"), float("inf")
RECORDS: dict[str, dict[str, Any]] = {
    "no config": {"config": None},
    "config as metrics": {"config": {"kind": "metrics", "values": {"steps": 1, "learning_rate": 1.0}}},
    "config as arrays": {"config": {"kind": "arrays", "values": {}}},
    "an empty config": {"config": {"kind": "config", "values": {}}},
    "one record more": {"privacy": {"kind": "config", "values": {"noise_multiplier": 0.1}}},
    "a refusal": {"refusal": {"kind": "config", "values": {"reason": "policy", "detail": ""}}},
}


@pytest.mark.parametrize("records", RECORDS.values(), ids=RECORDS)
def test_records_that_make_no_request_are_refused(liar: Liar, records: dict[str, Any]) -> None:
    changed = liar.honest() | records
    liar.refuses(RIGGED, {name: spec for name, spec in changed.items() if spec is not None}, "policy")


@pytest.mark.parametrize("kind", ["query", "evaluate", "train.other", "query.data", "evaluate.train"])
def test_no_other_message_trains(liar: Liar, kind: str) -> None:
    with liar.untouched(RIGGED):
        reply = liar.ask(RIGGED, liar.honest(), kind)
    assert reply == {"error": "ValueError"}


class Bomb:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path("unpickled"),)


def npy(header: str, body: bytes = b"") -> bytes:
    """A .npy file with a header that need not be true."""
    text = header.encode() + b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def archive(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, value)
    return buffer.getvalue()


def arrays() -> dict[str, dict[str, Any]]:
    ((name, good),) = weights().items()
    plain = array(good)
    raw = base64.b64decode(plain["data"])
    bad = good.copy()
    bad[3, 5] = NAN
    infinite = good.copy()
    infinite[0, 0] = -INF
    bombs = np.empty(good.shape, dtype=object)
    bombs[:] = Bomb()
    truth = {"dtype": plain["dtype"], "shape": plain["shape"]}
    rows, columns = good.shape
    head = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"
    return {
        "none": {},
        "one more": {name: plain, "extra": plain},
        "another name": {"weight": plain},
        "the layer's buffer": {name: plain, "0.running_mean": plain},
        "a scalar": {name: array(np.zeros((), np.float32))},
        "transposed": {name: array(good.T)},
        "flat": {name: array(good.reshape(-1))},
        "a row more": {name: array(np.zeros((rows + 1, columns), np.float32))},
        "empty": {name: array(np.zeros((0, columns), np.float32))},
        "float64": {name: array(good.astype(np.float64))},
        "float16": {name: array(good.astype(np.float16))},
        "int64": {name: array(good.astype(np.int64))},
        "complex": {name: array(good.astype(np.complex64))},
        "text": {name: array(good.astype(str), **truth)},
        "float64 that says float32": {name: array(good.astype(np.float64), **truth)},
        "transposed in secret": {name: array(good.T.copy(), **truth)},
        "nan": {name: array(bad)},
        "inf": {name: array(infinite)},
        "objects": {name: array(bombs)},
        "objects that say float32": {name: array(bombs, **truth)},
        "a pickle": {name: array(good, data=pickle.dumps(Bomb()))},
        "an archive": {name: array(good, data=archive(good))},
        "an archive of pickles": {name: array(good, data=archive(bombs))},
        "truncated": {name: array(good, data=raw[:-1])},
        "only a header": {name: array(good, data=raw[:128])},
        "no bytes": {name: array(good, data=b"")},
        "noise": {name: array(good, data=os.urandom(4096))},
        "another serializer": {name: array(good, stype="pickle")},
        "a huge shape": {name: array(good, shape=(2**40, 2**20))},
        "a huge shape in secret": {name: array(good, data=npy(head % f"({2**40}, {columns})"))},
        "a negative shape": {name: array(good, data=npy(head % f"(-1, {columns})", raw[128:]))},
        "code for a header": {name: array(good, data=npy("__import__('pathlib').Path('unpickled').touch()"))},
    }


ARRAYS = arrays()


@pytest.mark.parametrize("values", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_do_not_fit_the_clients_model_are_refused(liar: Liar, values: dict[str, Any]) -> None:
    liar.refuses(RIGGED, liar.honest() | {"arrays": {"kind": "arrays", "values": values}}, "model")
    assert not (liar.run.folder / "unpickled").exists()


def test_arrays_that_are_none_are_refused(liar: Liar) -> None:
    for records in ({}, {"arrays": {"kind": "config", "values": {}}}):
        request = {"config": liar.honest()["config"], **records}
        liar.refuses(RIGGED, request, "model")


def test_a_task_that_cannot_be_loaded_is_refused_without_a_word_of_its_files(tmp_path: Path) -> None:
    run = Federation(tmp_path)
    run.policy_content |= {"task": "tests.hostile.task:Lost", "data_root": str(tmp_path / "data")}
    run.configure()
    with pytest.raises(TaskError, match=str(tmp_path)):
        load_task(run.policy.task, run.policy.data_root).test_data()
    with pytest.raises(Refused) as caught:
        Bench(policy=run.policy).task()
    assert caught.value.reason == "model"
    assert str(tmp_path) not in caught.value.detail


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ((_, good),) = weights().items()
    bombs = np.empty(good.shape, dtype=object)
    bombs[:] = Bomb()
    np.load(io.BytesIO(base64.b64decode(array(bombs)["data"])), allow_pickle=True)
    assert (tmp_path / "unpickled").exists()


ANCHORS: dict[str, dict[str, Any]] = {
    "the future": {"anchor_sequence": 99, "anchor_head": "0" * 64},
    "the far future": {"anchor_sequence": 2**62, "anchor_head": ""},
    "another past": {"anchor_sequence": 1, "anchor_head": "0" * 64},
    "no hash": {"anchor_sequence": 2, "anchor_head": ""},
    "before the beginning": {"anchor_sequence": -1, "anchor_head": ""},
    "far before": {"anchor_sequence": -(2**62), "anchor_head": "0" * 64},
}


@pytest.mark.parametrize("changes", ANCHORS.values(), ids=ANCHORS)
def test_an_anchor_that_is_not_on_the_ledger_is_a_rollback(liar: Liar, changes: dict[str, Any]) -> None:
    liar.refuses(RIGGED, liar.honest(**changes), "rollback")
    assert metrics(liar.run.client_metrics)["fl_privacy_ledger_ok", liar.run.partitions[RIGGED]] == 0


def test_after_all_lies_an_honest_round_trains(liar: Liar) -> None:
    """Also what shows that the checks above look at the right ledger and at the right file."""
    for partition in (RIGGED, HONEST, RIGGED):
        name = liar.run.partitions[partition]
        before = liar.run.account(name)
        read = liar.records_read()
        anchor = {"anchor_sequence": before.sequence, "anchor_head": before.head}
        reply = liar.ask(partition, liar.honest(steps=4, **anchor))
        assert set(reply["records"]) == {"arrays", "metrics", "standing", "statement"}
        after = liar.run.account(name)
        assert (after.sequence, after.commits) == (before.sequence + 2, before.commits + 1)
        assert reply["records"]["standing"]["ledger_head"] == after.head
        assert set(reply["records"]["metrics"]) == {"weight"}
        if partition == HONEST:
            assert liar.records_read() > read
        liar.tells_nothing(reply)
    # What a false anchor made doubtful, an honest charge has cleared: a lie leaves no alarm behind.
    assert metrics(liar.run.client_metrics)["fl_privacy_ledger_ok", liar.run.partitions[RIGGED]] == 1
    assert liar.run.log("client").count(": connected\n") == 2, "a partition had to join again"
    assert "Traceback" not in liar.run.log("client")


def test_the_servers_code_never_reaches_a_client(liar: Liar, tmp_path: Path) -> None:
    def fetched() -> int:
        return liar.run.log("server").count("[Fleet.GetFab]") + liar.run.log("server").count("[Fleet.GetRun]")

    assert liar.run.log("server").count("[Fleet.ActivateNode]") >= 2  # such calls are in the log
    assert fetched() == 0
    assert not list(liar.run.folder.rglob("bundle-code-ran"))

    # Neither check is blind: the code does run where it is imported, and who asks for it is seen.
    subprocess.run([sys.executable, "-c", "import stolen"], cwd=tmp_path, env=_path(HERE / "bundle"), check=True)
    assert (tmp_path / "bundle-code-ran").exists()
    settings = liar.run.policy.client
    fleet = Fleet(settings.server_address, liar.run.folder / settings.ca_certificate)
    node = Node(fleet, liar.run.folder / liar.run.policy.key_path(liar.run.partitions[SPARE]), 10**9)
    node.activate()
    with pytest.raises(FleetError):
        node._call(fleet.stub.GetFab, GetFabRequest(node=node._node, hash_str="x", run_id=1))
    fleet.close()
    assert fetched() == 1


def _path(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}
