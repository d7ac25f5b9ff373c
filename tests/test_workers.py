"""A real zygote and real workers, driven by a host process: jobs, refusals, deaths, and what leaves a worker."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from scipy import stats
from torch import nn

from client.app import Bench, pick_device
from client.dialogue import Done
from client.fleet import Inbound
from client.ledger import Account, Ledger, create, read
from client.policy import Refused, worst_round
from client.workers import WorkerDied, ZygoteDied
from common.config import Policy, load, parse
from common.messages import ARRAYS, CONFIG, REFUSAL, STANDING, Proposal, Reason, Standing, request
from common.tasks.digits import Digits
from tests import wire
from tests.federation import children, wait_for
from tests.statistics_checks import correlation_p_value, rejected
from tests.workers.task import MARKER

ROOT = Path(__file__).parent.parent
TASK = "tests.workers.task:Obedient"
PARTITIONS = 60
STEPS, LEARNING_RATE = 4, 16.0
ANSWER_SECONDS = 120.0
IDLE_SECONDS = 3.0
SENT = {name: parameter.detach().numpy() for name, parameter in Digits(Path()).model().named_parameters()}


class Host:
    """The host process, and the partitions that it serves: each test takes some of its own."""

    def __init__(self, folder: Path, **training: Any) -> None:
        self.folder = folder
        names = [f"p{index}" for index in range(PARTITIONS)]
        policy = {
            "task": TASK,
            "data_root": str(folder),
            "privacy": {
                "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 4.0, "max_grad_norm": 0.5, "batch_size": 8,
                "records": 20, "max_steps_per_round": STEPS, "accounting": "adaptive",
            },
            "training": {"device": "cpu", **training},
            "client": {"state": str(folder / "state")},
            "partitions": [{"name": name, "index": i, "of": PARTITIONS} for i, name in enumerate(names)],
        }  # fmt: skip
        (folder / "policy.yaml").write_text(yaml.safe_dump(policy))
        self.policy = load(Policy, folder / "policy.yaml")
        self._unused = iter(names)
        self.missing, self.exhausted = next(self._unused), next(self._unused)
        for name in names:
            if name != self.missing:
                create(self.policy.ledger_path(name), partition=name, privacy=self.policy.privacy)
        self._exhaust(self.exhausted)
        ours, theirs = socket.socketpair()
        with theirs, open(folder / "host.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.workers.host", str(folder / "policy.yaml"), str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                pass_fds=[theirs.fileno()],
                stderr=log,
            )
        self._connection = Connection(ours.detach())
        self._numbers = itertools.count()
        self._results: dict[int, Any] = {}
        self.facts()  # it answers once its ledgers are open, which is a line in each

    def close(self) -> None:
        """Ends the host, the zygote and the workers."""
        self._connection.close()
        try:
            assert self.process.wait(30) == 0
        finally:
            self.process.kill()

    def partition(self) -> str:
        """A partition that no worker has served yet: its data will be read."""
        return next(self._unused)

    def order(self, word: str) -> None:
        (self.folder / "order").write_text(word)
        (self.folder / "readers").unlink(missing_ok=True)

    def submit(self, *job: Any) -> int:
        number = next(self._numbers)
        self._connection.send((number, *job))
        return number

    def result(self, number: int) -> Any:
        """A Done, or the type of the error that the host would have met."""
        while number not in self._results:
            assert self._connection.poll(ANSWER_SECONDS), self.log()
            got, result = self._connection.recv()
            self._results[got] = result
        return self._results.pop(number)

    def run(self, partition: str, inbound: Inbound | None = None) -> Any:
        return self.result(self.submit(partition, inbound or asking()))

    def facts(self) -> dict[str, Any]:
        return self.result(self.submit())

    def account(self, partition: str) -> Account:
        return read(self.policy.ledger_path(partition))

    @property
    def zygote(self) -> int:
        (pid,) = children(self.process.pid)
        return pid

    def workers(self) -> list[int]:
        return [pid for pid in children(self.zygote) if lives(pid)]

    def log(self) -> str:
        return (self.folder / "host.log").read_text()

    def _exhaust(self, partition: str) -> None:
        privacy = self.policy.privacy
        ledger = Ledger.open(self.policy.ledger_path(partition), partition=partition, privacy=privacy)
        steps = STEPS * ledger.account.rounds_remaining(worst_round(privacy))
        ledger.reserve("all of it", replace(worst_round(privacy), steps=steps))
        ledger.close()


def lives(pid: int) -> bool:
    """Whether the process runs: one that is dead and not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def proposal(**changes: Any) -> Proposal:
    """An honest one, with a few changes."""
    honest = {
        "task": TASK, "round": 1, "steps": STEPS, "learning_rate": LEARNING_RATE, "anchor_sequence": 0,
        "anchor_head": "",
    }  # fmt: skip
    return Proposal(**{**honest, **changes})


def asking(arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> Inbound:
    """A request of the server's."""
    record = ArrayRecord({name: Array(value) for name, value in (arrays or SENT).items()})
    return wire.inbound(request(record, proposal(**changes)))


def answered(done: Any) -> Message:
    assert isinstance(done, Done), done
    return wire.reply(done.outbound)


def update(done: Any) -> np.ndarray:
    """What the round moved, flat."""
    arrays = answered(done).content[ARRAYS]
    return np.concatenate([(arrays[name].numpy() - value).ravel() for name, value in SENT.items()])


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"), max_workers=2, idle_seconds=IDLE_SECONDS)
    yield host
    host.close()


@pytest.fixture(autouse=True)
def _no_order(request: pytest.FixtureRequest) -> None:
    if "host" in request.fixturenames:
        request.getfixturevalue("host").order("")


def test_a_job_is_charged_trained_and_answered(host: Host) -> None:
    partition = host.partition()
    done = host.run(partition, asking(round=17))
    account = host.account(partition)
    assert (len(account.messages), account.commits, account.open) == (1, 1, {})
    assert (done.round, done.steps, done.refused) == (17, STEPS, None)
    content = answered(done).content
    assert set(content) == {"arrays", "metrics", "standing"}
    standing = Standing.from_record(content[STANDING])
    assert (standing.ledger_sequence, standing.ledger_head) == (account.sequence, account.head)
    assert standing.epsilon_spent == account.epsilon_spent
    assert np.isfinite(update(done)).all()
    assert np.abs(update(done)).max() > 0


def refusal(host: Host, reason: Reason) -> tuple[str, Inbound]:
    """A partition and a message that make the client refuse for this reason."""
    partition = host.partition()
    match reason:
        case Reason.BUDGET:
            return host.exhausted, asking()
        case Reason.POLICY:
            return partition, asking(steps=STEPS + 1)
        case Reason.LEDGER:
            return host.missing, asking()
        case Reason.ROLLBACK:
            return partition, asking(anchor_sequence=99, anchor_head="0" * 64)
        case Reason.DUPLICATE:
            inbound = asking()
            assert host.run(partition, inbound).refused is None
            return partition, inbound
        case Reason.MODEL:
            return partition, asking({name: value[:-1] for name, value in SENT.items()})
        case Reason.DATA:
            host.order("unreadable")
            return partition, asking()


# Memory needs a GPU, or the stand-in for one in tests/test_gpu.py.
@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.MEMORY])
def test_each_refusal_is_typed_and_only_unreadable_data_costs(host: Host, reason: Reason) -> None:
    partition, inbound = refusal(host, reason)
    path = host.policy.ledger_path(partition)
    before = path.read_bytes() if path.exists() else b""
    done = host.run(partition, inbound)
    assert done.refused is reason
    content = answered(done).content
    assert content[REFUSAL]["reason"] == str(reason)
    assert set(content) == ({REFUSAL} if reason is Reason.LEDGER else {REFUSAL, STANDING})
    after = path.read_bytes() if path.exists() else b""
    if reason is not Reason.DATA:
        assert after == before
        return
    account = host.account(partition)
    assert (len(account.messages), account.commits) == (1, 0)  # when it failed is data too: the charge stays
    assert "OSError" in content[REFUSAL]["detail"]
    assert MARKER not in content[REFUSAL]["detail"]
    assert MARKER not in host.log()


def array(value: np.ndarray, **lies: Any) -> Array:
    """A Flower array, with some of its fields replaced."""
    real = Array(value)
    return Array(**{"dtype": real.dtype, "shape": real.shape, "stype": real.stype, "data": real.data, **lies})


WEIGHT = SENT["1.weight"]
MALFORMED: dict[str, tuple[dict[str, Any], Reason, str]] = {
    "another record": ({"extra": ConfigRecord({"a": 1})}, Reason.POLICY, "expected no records but"),
    "no config": ({CONFIG: None}, Reason.POLICY, "expected a record of"),
    "a config of other keys": ({CONFIG: ConfigRecord({"task": TASK})}, Reason.POLICY, "expected a record of"),
    "no arrays": ({ARRAYS: None}, Reason.MODEL, "no arrays"),
    "a config for arrays": ({ARRAYS: ConfigRecord({})}, Reason.MODEL, "no arrays"),
    "no parameters": ({ARRAYS: {}}, Reason.MODEL, "expected exactly ['1.weight']"),
    "one too many": ({ARRAYS: {"1.weight": array(WEIGHT), "bias": array(WEIGHT)}}, Reason.MODEL, "expected exactly"),
    "another type": ({ARRAYS: {"1.weight": array(WEIGHT.astype(np.float64))}}, Reason.MODEL, "as float32 [10, 64]"),
    "another shape": ({ARRAYS: {"1.weight": array(WEIGHT.T)}}, Reason.MODEL, "as float32 [10, 64]"),
    "a shape that lies": ({ARRAYS: {"1.weight": array(WEIGHT.T, shape=(10, 64))}}, Reason.MODEL, "announced shape"),
    "a type that lies": (
        {ARRAYS: {"1.weight": array(WEIGHT.astype(np.float64), dtype="float32")}}, Reason.MODEL, "announced shape"
    ),
    "no number": ({ARRAYS: {"1.weight": array(WEIGHT * np.nan)}}, Reason.MODEL, "finite"),
    "infinity": ({ARRAYS: {"1.weight": array(WEIGHT + np.inf)}}, Reason.MODEL, "finite"),
    "no array at all": ({ARRAYS: {"1.weight": array(WEIGHT, data=b"no array")}}, Reason.MODEL, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_before_the_charge(host: Host, name: str) -> None:
    changes, reason, words = MALFORMED[name]
    partition = host.partition()
    content = request(ArrayRecord({"1.weight": array(WEIGHT)}), proposal())
    for key, value in changes.items():
        if key in content:
            del content[key]
        if value is not None:
            content[key] = ArrayRecord(value) if isinstance(value, dict) else value
    done = host.run(partition, wire.inbound(content))
    assert done.refused is reason
    assert words in answered(done).content[REFUSAL]["detail"]
    assert host.account(partition).messages == set()


def test_what_is_wrong_with_the_owners_side_is_refused_without_its_secrets(tmp_path: Path) -> None:
    terms = {
        "epsilon": 8.0, "delta": 0.04, "noise_multiplier": 4.0, "max_grad_norm": 0.5, "batch_size": 8, "records": 20,
        "max_steps_per_round": 1,
    }  # fmt: skip

    def bench(task: str) -> Bench:
        content = {"task": task, "data_root": str(tmp_path), "privacy": terms, "partitions": [{"name": "a", "of": 40}]}
        return Bench(policy=parse(Policy, content, source="test"))

    for task, words in (
        ("absent_module:Task", "cannot be loaded here"),
        (f"{MixesRecords.__module__}:MixesRecords", "BatchNorm1d"),
    ):
        with pytest.raises(Refused, match=words) as refused:
            bench(task).task()
        assert refused.value.reason is Reason.MODEL
        assert str(tmp_path) not in refused.value.detail
    digits = bench("digits")
    with pytest.raises(Refused, match="delta is not below 1/n") as refused:  # n is 36, the nominal one 20
        digits.data(digits.policy.partitions[0], pick_device("cpu"))
    assert refused.value.reason is Reason.DATA
    assert "36" not in refused.value.detail


class MixesRecords(Digits):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), Floats(), nn.BatchNorm1d(64), nn.Linear(64, 10))


class Floats(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float()


def test_of_an_error_in_training_only_the_type_leaves(host: Host) -> None:
    partition = host.partition()
    host.order("crash")
    message = answered(host.run(partition))
    assert message.has_error()
    assert message.error.reason == "IndexError"  # its text would hold the record's class
    assert "4711" not in host.log()
    assert (len(host.account(partition).messages), host.account(partition).commits) == (1, 0)


def test_garbage_harms_nobody_for_good(host: Host) -> None:
    partition, generator = host.partition(), random.Random(5)
    honest = asking()
    for size in (0, 1, 40, 4000):
        for content in ({}, {honest.message_id: generator.randbytes(size)}):
            message = answered(host.run(partition, replace(honest, objects=content)))
            assert message.has_error()
            assert message.error.reason.startswith("the message cannot be read")
        host.run(partition, replace(honest, envelope=generator.randbytes(size), objects={}))
    cut = {key: value[: len(value) // 2] for key, value in honest.objects.items()}
    assert answered(host.run(partition, replace(honest, objects=cut))).has_error()
    assert host.account(partition).messages == set()
    assert host.run(partition).refused is None


def test_other_kinds_of_message_are_errors(host: Host) -> None:
    partition = host.partition()
    content = request(ArrayRecord({}), proposal())
    for kind in ("evaluate", "query", "train.other"):
        assert answered(host.run(partition, wire.inbound(content, kind))).has_error()
    assert host.account(partition).messages == set()


def test_idle_workers_end_and_new_ones_come(host: Host) -> None:
    partition = host.partition()
    assert host.run(partition).refused is None
    first = host.workers()
    deaths = host.facts()["deaths"]
    wait_for(lambda: not host.workers(), "the idle workers' end", IDLE_SECONDS + 10)
    assert host.run(partition, asking(round=2)).refused is None
    (second,) = host.workers()
    assert second not in first
    assert host.facts()["deaths"] == deaths


@pytest.mark.parametrize(("order", "charges"), [("die before the charge", 0), ("die after it", 1)])
def test_a_worker_that_is_killed_costs_what_it_reserved_and_nobody_else(host: Host, order: str, charges: int) -> None:
    partition, other = host.partition(), host.partition()
    deaths = host.facts()["deaths"]
    host.order(order)
    # One that dies before it asks may be taken for one that was idle too long: the job is then given to a fresh one.
    assert host.run(partition) is WorkerDied
    assert host.facts()["deaths"] == deaths + 1
    account = host.account(partition)
    assert (len(account.messages), account.commits) == (charges, 0)
    assert (account.epsilon_spent > 0) == (charges > 0)
    host.order("")
    assert host.run(other).refused is None
    assert host.run(partition).refused is None


def test_no_more_workers_than_the_owner_allows(host: Host) -> None:
    host.order("hold")
    jobs = [host.submit(host.partition(), asking()) for _ in range(6)]
    most = 0
    for job in jobs:
        while not host._connection.poll(0.02) and job not in host._results:
            most = max(most, len(host.workers()))
        assert host.result(job).refused is None
    assert most == 2
    assert len(set((host.folder / "readers").read_text().split())) == 2


def together(host: Host, order: str) -> list[np.ndarray]:
    """The updates of two partitions, trained by two workers at the same time."""
    host.order(order)
    updates = [update(host.result(job)) for job in [host.submit(host.partition(), asking()) for _ in range(2)]]
    assert len(set((host.folder / "readers").read_text().split())) == 2
    return updates


def test_what_workers_release_has_the_owners_noise_and_shares_none(host: Host) -> None:
    privacy = host.policy.privacy
    std = LEARNING_RATE * privacy.noise_multiplier * privacy.max_grad_norm / privacy.batch_size * STEPS**0.5
    updates = [noise for _ in range(3) for noise in together(host, "blank, meet")]
    pairs = {f"{a} and {b}": correlation_p_value(updates[a], updates[b]) for a in range(6) for b in range(a)}
    assert not rejected(pairs)
    assert not rejected(_noise_checks(np.concatenate(updates), std))
    assert rejected(_noise_checks(np.concatenate(updates), 2 * std))  # as if the noise were half


def test_noise_that_workers_share_is_noticed(host: Host) -> None:
    """The negative control of the test above."""
    assert rejected({"pair": correlation_p_value(*together(host, "blank, meet, seeded"))})


def _noise_checks(noise: np.ndarray, std: float) -> dict[str, float]:
    chi2, squares = stats.chi2(noise.size), float(np.square(noise / std, dtype=np.float64).sum())
    return {
        "variance": 2 * min(chi2.cdf(squares), chi2.sf(squares)),
        "ks": float(stats.kstest(noise / std, "norm").pvalue),
    }


def test_the_host_stays_light_and_the_zygote_single_threaded(host: Host) -> None:
    assert host.run(host.partition()).refused is None
    facts = host.facts()
    assert facts["modules"] & {"torch", "opacus", "sklearn"} == set()
    assert facts["gpu"] == 0
    assert "grpc" in facts["modules"]  # the control: it has imported what a host imports
    assert len(os.listdir(f"/proc/{host.zygote}/task")) == 1
    assert "its workers may hang" not in host.log()


def test_without_its_zygote_the_host_says_so(tmp_path: Path) -> None:
    host = Host(tmp_path)
    partition = host.partition()
    assert host.run(partition).refused is None
    (worker,) = host.workers()
    os.kill(host.zygote, signal.SIGKILL)
    wait_for(lambda: not lives(worker), "the end of the zygote's worker", 10)
    before = host.account(partition).sequence
    for _ in range(3):
        assert host.run(partition) in (ZygoteDied, WorkerDied)
    assert host.run(partition) is ZygoteDied
    assert host.account(partition).sequence == before
    host.process.kill()
    host.process.wait()


def test_nobody_outlives_the_host(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.order("meet")  # one worker that trains and waits in vain
    job = host.submit(host.partition(), asking())
    wait_for(lambda: (tmp_path / "readers").exists(), "a worker that trains", 120)
    zygote, workers = host.zygote, host.workers()
    assert workers
    assert job not in host._results
    host.process.kill()
    host.process.wait()
    wait_for(lambda: not any(lives(pid) for pid in (zygote, *workers)), "the end of zygote and worker", 10)
