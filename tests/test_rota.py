"""Many partitions on a few threads: who is asked for when, who may be at work, and what they share."""

import hashlib
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from client import fleet, objects, rota
from client.fleet import Inbound, heartbeat_seconds
from client.objects import Objects
from client.rota import BUSY_POLLS, IDLE_POLLS, POLLERS, SENDERS, Pace, Rota
from client.workers import ZygoteDied
from tests.federation import wait_for

MANY = 200
MAX_WORKERS = 2


class Server:
    """What the network's edge is here: partitions that note when they are asked for."""

    def __init__(self, partitions: int) -> None:
        self.members = [Partition(self, number) for number in range(partitions)]
        self.stop = threading.Event()
        self.rota = Rota(self.members, MAX_WORKERS, self.stop)  # type: ignore[arg-type]
        self.polls: list[float] = []
        self.at_work = self.most_at_work = self.served = 0
        self.held = threading.Event()
        self.held.set()
        self.lock = threading.Lock()

    def end(self) -> None:
        self.stop.set()
        self.rota.end(10.0)


class Partition:
    def __init__(self, server: Server, number: int) -> None:
        self.server, self.number = server, number
        self.partition = SimpleNamespace(name=f"p{number}")
        self.asked: list[float] = []
        self.messages: list[Inbound] = []
        self.problem: Exception | float | None = None
        self.left = 0

    def poll(self) -> tuple[Inbound | None, float | None]:
        with self.server.lock:
            self.asked.append(time.monotonic())
            self.server.polls.append(self.asked[-1])
        if isinstance(self.problem, Exception):
            raise self.problem
        if self.problem is not None:
            return None, self.problem
        return (self.messages.pop() if self.messages else None), None

    def serve(self, inbound: Inbound, _: threading.Event) -> None:
        server = self.server
        with server.lock:
            server.at_work += 1
            server.most_at_work = max(server.most_at_work, server.at_work)
        server.held.wait(20)
        with server.lock:
            server.at_work -= 1
            server.served += 1
        if inbound.group == "fatal":
            raise ZygoteDied("gone")

    def leave(self) -> None:
        self.left += 1


def message(group: str) -> Inbound:
    return Inbound(run_id=1, message_id="", envelope=b"", objects={}, group=group)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rota, "STAGGER_SECONDS", 0.001)
    server = Server(MANY)
    yield server
    server.end()


def test_hundreds_are_asked_for_by_a_few_threads_at_a_bounded_rate(many: Server) -> None:
    before = threading.active_count()
    many.rota.start()
    wait_for(lambda: all(len(member.asked) > 1 for member in many.members), "everybody's second turn", 30)
    assert threading.active_count() <= before + POLLERS
    many.polls.clear()
    time.sleep(2.0)
    assert len(many.polls) < 2.0 * BUSY_POLLS * 4 / 3  # by the jitter the shortest is 3/4 of the usual


def test_without_a_message_all_slow_down() -> None:
    for partitions in (1, 3, 50, 500, 1000):
        pace = Pace.of(partitions)
        assert 0.2 <= pace.fast < pace.idle
        assert partitions / pace.idle <= IDLE_POLLS + 1e-9 or pace.idle == 0.3 + 0.02 * partitions
        assert partitions / pace.fast <= BUSY_POLLS + 1e-9
    assert Pace.of(1).idle == pytest.approx(0.32)
    assert Pace.of(500).idle == 20.0


def test_the_first_message_of_a_round_calls_the_others(many: Server) -> None:
    many.rota._pace = Pace(fast=0.5, idle=60.0)
    many.rota._interval = [60.0] * MANY
    many.rota.start()
    wait_for(lambda: all(member.asked for member in many.members), "everybody's first turn", 30)
    time.sleep(0.2)
    assert all(len(member.asked) == 1 for member in many.members)  # the control: nobody comes by itself
    for number, member in enumerate(many.members):
        member.messages = [message("7")] if number % 2 else []
    with many.rota._change:  # one partition's time comes
        many.rota._due[0] = (0.0, many.rota._due[0][1])
        first = many.members[many.rota._due[0][1]]
        first.messages = [message("7")]
        many.rota._change.notify()
    wait_for(lambda: many.served >= MANY // 2, "the round", 20)
    asked = [len(member.asked) for member in many.members]
    assert min(asked) >= 2
    many.polls.clear()
    time.sleep(0.3)
    assert len(many.polls) < MANY  # who has answered waits for the next round


def test_who_is_sent_to_late_in_a_round_is_asked_for_as_often_until_then() -> None:
    server = Server(16)
    server.rota._pace = Pace(fast=0.2, idle=30.0)
    server.rota._interval = [0.2] * 16
    server.rota.start()
    for member in server.members:
        member.messages = [message("7")]
        time.sleep(0.2)
    wait_for(lambda: server.served == 16, "the round", 5)
    asked = server.members[-1].asked
    assert max(later - sooner for sooner, later in pairwise(asked)) < 1.0  # with growth up to 1.5
    assert len(server.members[0].asked) <= 4  # who has answered is left alone
    server.end()


def test_no_more_are_at_work_than_can_train_and_send(many: Server) -> None:
    many.held.clear()
    for member in many.members:
        member.messages = [message("1")]
    before = threading.active_count()
    many.rota.start()
    wait_for(lambda: many.at_work == MAX_WORKERS + SENDERS, "all jobs", 10)
    polled = len(many.polls)
    time.sleep(0.5)
    assert len(many.polls) <= polled + 1  # what could not be begun stays at the server
    assert threading.active_count() <= before + POLLERS + MAX_WORKERS + SENDERS
    many.held.set()
    wait_for(lambda: many.served == MANY, "all to be served", 30)
    assert many.most_at_work == MAX_WORKERS + SENDERS


def test_one_that_fails_stops_nobody(many: Server) -> None:
    many.members[3].problem = 0.05
    many.members[5].problem = RuntimeError("ours")
    many.rota.start()
    wait_for(lambda: all(member.asked for member in many.members), "everybody's turn", 30)
    wait_for(lambda: len(many.members[3].asked) > 3 and len(many.members[5].asked) > 1, "theirs again", 30)
    many.members[5].problem = None
    many.members[5].messages = [message("2")]
    wait_for(lambda: many.served == 1, "the one that recovered", 30)


def test_all_leave_once_and_those_at_work_when_they_are_done(many: Server) -> None:
    many.held.clear()
    many.members[0].messages = [message("1")]
    many.rota.start()
    wait_for(lambda: many.at_work == 1, "a job", 10)
    many.stop.set()
    ending = threading.Thread(target=many.rota.end, args=(10.0,))
    ending.start()
    wait_for(lambda: sum(member.left for member in many.members) == MANY - 1, "the others to leave", 10)
    assert many.members[0].left == 0
    many.held.set()
    ending.join(5)
    assert not ending.is_alive()
    assert [member.left for member in many.members] == [1] * MANY


def test_without_workers_all_ends(many: Server) -> None:
    many.members[1].messages = [message("fatal")]
    many.rota.start()
    assert many.stop.wait(10)
    assert many.rota.failed is not None
    assert "no worker can be forked any more: gone" in many.rota.failed


def test_a_zygote_that_was_told_to_end_as_well_is_no_failure(many: Server) -> None:
    many.rota.start()
    many.stop.set()
    many.rota.fail("gone")
    assert many.rota.failed is None


def test_heartbeats_of_many_are_rarer() -> None:
    assert heartbeat_seconds(1) == heartbeat_seconds(300) == 15
    assert heartbeat_seconds(1000) == 50
    assert fleet.HEARTBEATS_PER_SECOND == 20


# Objects.


def named(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_only_a_content_of_its_hash_is_kept() -> None:
    kept = Objects(1000)
    kept.keep(named(b"model"), b"model")
    kept.keep(named(b"other"), b"false")
    assert kept.get(named(b"model")) == b"model"
    assert kept.get(named(b"other")) is None


def test_what_is_kept_is_bounded_and_the_least_used_goes_first() -> None:
    kept = Objects(250)
    first, second, third = (bytes([number]) * 100 for number in range(3))
    kept.keep(named(first), first)
    kept.keep(named(second), second)
    assert kept.get(named(first)) == first
    kept.keep(named(third), third)
    assert [kept.get(named(each)) for each in (first, second, third)] == [first, None, third]
    kept.keep(named(bytes(251)), bytes(251))
    assert kept.get(named(bytes(251))) is None
    kept.keep(named(third), third)  # twice is once
    assert [kept.get(named(each)) for each in (first, third)] == [first, third]


def test_what_nobody_uses_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Objects(1000)
    kept.keep(named(b"a"), b"a")
    kept.forget_unused()
    assert kept.get(named(b"a")) == b"a"
    monkeypatch.setattr(objects, "KEEP_SECONDS", -1.0)
    kept.forget_unused()
    assert kept.get(named(b"a")) is None
    assert kept._bytes == 0


def test_many_that_want_the_same_pull_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAIT_SECONDS", 10.0)
    assert pulls(Objects(1000)) == 1
    assert pulls(Objects(0)) == 8  # the control


def test_who_stalls_holds_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAIT_SECONDS", 0.05)
    kept = Objects(1000)
    with kept.pulled_once("x"):
        started = time.monotonic()
        inside = run(lambda: want(kept, "x", []))
        inside.join(5)
        assert not inside.is_alive()
        assert time.monotonic() - started >= 0.05
    assert kept._pulling == {}


def pulls(kept: Objects) -> int:
    """How often 8 threads pull one object that takes its time."""
    count: list[int] = []
    threads = [run(lambda: want(kept, named(b"model"), count)) for _ in range(8)]
    for thread in threads:
        thread.join()
    return len(count)


def want(kept: Objects, name: str, pulled: list[int]) -> None:
    with kept.pulled_once(name):
        if kept.get(name) is None:
            pulled.append(1)
            time.sleep(0.1)
            kept.keep(name, b"model")


def run(target: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread
