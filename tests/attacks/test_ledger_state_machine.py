"""Attack: any interleaving of reserve, commit, crash at any call, reopening, a second writer, tampering, an old copy
put back, and an owner who raises and lowers the budget; with or without an anchor. Ten thousand steps.

Holds: what was acknowledged is there, epsilon never falls, no charge exceeds the budget in force, a changed file is
refused. Real files; a crash is simulated (from one call on, none is made), since case 3 has the real ones.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from client import accounting
from client.ledger import (
    Account,
    BudgetExhausted,
    DuplicateMessage,
    Head,
    Ledger,
    LedgerError,
    RolledBack,
    chain,
    create,
    read,
    writer,
)
from common.config import Privacy
from tests.attacks.holes import lenient
from tests.ledgers import MEMORY, release, terms

STEPS = 10_000
STEPS_PER_LIFE = 50
CALLS = ("open", "write", "fsync", "ftruncate", "close", "replace", "mkdir")
MOST_CALLS = 18  # of one operation: reserving takes 12 with an anchor
BUDGETS = [0.5, 2.0, 4.0]
CHARGES = [20, 60]  # steps: few sums, so that their epsilons are soon all in the cache

quick = settings(
    max_examples=STEPS // STEPS_PER_LIFE + 120,
    stateful_step_count=STEPS_PER_LIFE,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class Crash(BaseException):
    """The process is gone."""


class Clock:
    """Ticks once for each line, and begins anew with each machine: a failure can be repeated to the byte."""

    ticks = 0

    @classmethod
    def now(cls, _: object) -> datetime:
        cls.ticks += 1
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=cls.ticks)

    fromisoformat = datetime.fromisoformat


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "datetime", Clock)
    monkeypatch.setattr(writer, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"{Clock.ticks:032}")))


@contextmanager
def crashing(at: int, tear: bool) -> Iterator[None]:
    """From the `at`-th of CALLS on nothing reaches the disk, not even what a `finally` would still do."""
    real = {name: getattr(os, name) for name in CALLS}
    count, opened = 0, set()

    def around(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= at:
                if count == at and tear and name == "write":
                    real["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Crash
            result = real[name](*arguments, **options)
            if name == "open":
                opened.add(result)
            if name == "close":
                opened.discard(arguments[0])
            return result

        return call

    for name in CALLS:
        setattr(os, name, around(name))
    try:
        yield
    except Crash:
        for fd in opened:  # as the kernel does
            real["close"](fd)
        raise
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


class AnyOrder(RuleBasedStateMachine):
    """One partition's ledger, its client, its owner and its enemies."""

    steps = 0  # of all machines

    def __init__(self) -> None:
        super().__init__()
        Clock.ticks = 0
        self._folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.path = Path(self._folder.name) / "a/ledger.jsonl"
        self.ledger: Ledger | None = None
        self.content = b""  # of the file, while it is honest
        self.copies: list[bytes] = []
        self.acknowledged: dict[str, int] = {}  # steps by message
        self.in_doubt: dict[str, int] = {}  # asked for when the process crashed
        self.spent = 0.0
        self.count = 0
        self.budget = 4.0
        self.locked = False
        self.seen = Head(sequence=0, hash="")  # by the server

    @initialize(accounting=st.sampled_from(["fixed", "adaptive"]), anchored=st.booleans(), server=st.booleans())
    def start(self, accounting: str, anchored: bool, server: bool) -> None:
        self.accounting, self.server = accounting, server
        self.anchor = Path(self._folder.name) / "elsewhere/a.json" if anchored else None
        create(self.path, partition="a", privacy=self.terms(self.budget), anchor=self.anchor)
        self.content = self.path.read_bytes()

    def terms(self, epsilon: float) -> Privacy:
        return terms(epsilon=epsilon, accounting=self.accounting)

    def opened(self, epsilon: float) -> Ledger:
        """As a client opens it, and as its first question asks."""
        ledger = Ledger.open(self.path, partition="a", privacy=self.terms(epsilon), anchor=self.anchor)
        try:
            if self.server:
                ledger.require_head(self.seen)
        except RolledBack:
            ledger.close()
            raise
        return ledger

    # What a client does.

    @rule(epsilon=st.sampled_from(BUDGETS))
    @precondition(lambda self: self.ledger is None)
    def open(self, epsilon: float) -> None:
        self.ledger, self.locked = self.opened(epsilon), True
        self.budget = epsilon
        assert self.ledger.account.budget == epsilon

    @rule(steps=st.sampled_from(CHARGES), again=st.booleans())
    @precondition(lambda self: self.ledger is not None)
    def reserve(self, steps: int, again: bool) -> None:
        message = self.message(again)
        charged = message in self.ledger.account.messages
        try:
            self.ledger.reserve(message, release(steps))
        except DuplicateMessage:
            assert charged
        except BudgetExhausted:
            assert self.epsilon(extra=steps) > self.budget
        else:
            assert not charged
            self.acknowledged[message] = steps
            assert self.epsilon() <= self.budget
            self.seen = self.head()

    @rule(data=st.data())
    @precondition(lambda self: self.ledger is not None and self.ledger.account.open)
    def commit(self, data: st.DataObject) -> None:
        self.ledger.commit(data.draw(st.sampled_from(sorted(self.ledger.account.open))))
        self.seen = self.head()

    @rule()
    @precondition(lambda self: self.ledger is not None)
    def end(self) -> None:
        self.ledger.close()
        self.ledger = None

    @rule(
        at=st.integers(1, MOST_CALLS),
        tear=st.booleans(),
        epsilon=st.sampled_from(BUDGETS),
        steps=st.sampled_from(CHARGES),
    )
    def crash(self, at: int, tear: bool, epsilon: float, steps: int) -> None:
        """In the middle of whatever it does next: opening, committing or reserving; the lock goes with the process."""
        message = self.message(again=False)
        ledger, self.ledger = self.ledger, None
        try:
            with crashing(at, tear):
                if ledger is None:
                    ledger = self.opened(epsilon)
                elif ledger.account.open and at % 2:
                    ledger.commit(min(ledger.account.open))
                else:
                    self.in_doubt = {message: steps}
                    ledger.reserve(message, release(steps))
        except (Crash, BudgetExhausted):
            pass
        if ledger is not None:
            os.close(ledger._file._fd)
        raw = self.path.read_bytes()
        assert raw.startswith(self.content)
        if not raw.endswith(b"\n"):
            self.refused("torn")
            self.path.write_bytes(raw[: raw.rindex(b"\n") + 1])  # the owner's act: nobody was told of that line
        self.settle()

    # What others do.

    @rule()
    @precondition(lambda self: self.ledger is not None and self.locked)
    def second_writer(self) -> None:
        self.refused("another client holds it")

    @rule(epsilon=st.sampled_from(BUDGETS), steps=st.sampled_from(CHARGES), commits=st.booleans())
    @precondition(lambda self: self.ledger is not None)
    def second_writer_whom_no_lock_stops(self, epsilon: float, steps: int, commits: bool) -> None:
        """A lost lock: from its first line on the other one does nothing more."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain.fcntl, "flock", lambda *_: None)
            second = self.opened(epsilon)
        after = self.path.read_bytes()
        act = self.ledger.check
        if commits and self.ledger.account.open:
            act = lambda: self.ledger.commit(min(self.ledger.account.open))  # noqa: E731
        for attempt in (act, lambda: self.ledger.reserve("late", release(steps))):
            with pytest.raises(LedgerError, match="changed by another writer"):
                attempt()
        assert self.path.read_bytes() == after
        self.ledger.close()
        self.ledger, self.locked, self.budget = second, False, epsilon

    @rule(data=st.data(), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def tamper(self, data: st.DataObject, where: float, bit: int) -> None:
        """One byte, one line, two lines, the tail, in place, under the eyes of the client or while it is away."""
        lines = self.content.splitlines(keepends=True)
        kind = data.draw(st.sampled_from(["byte", "tail"] + ["drop", "swap"] * (len(lines) > 1)))
        index = int(where * (len(lines) - 1))
        edited = bytearray(self.content)
        if kind == "byte":
            edited[int(where * len(edited))] ^= 1 << bit
        elif kind == "tail":
            edited = edited[: max(1, int(where * len(edited)))]
        elif kind == "drop":
            del lines[index]
            edited = bytearray(b"".join(lines))
        else:
            lines[index], lines[index + 1] = lines[index + 1], lines[index]
            edited = bytearray(b"".join(lines))
        if not self.content.startswith(edited):  # a prefix of whole lines is an old copy, which is the next rule
            self.changed(bytes(edited))
            return
        if not edited.endswith(b"\n"):
            self.changed(bytes(edited))

    @rule(data=st.data(), replaced=st.booleans())
    @precondition(lambda self: self.copies)
    def old_copy(self, data: st.DataObject, replaced: bool) -> None:
        """Whole and honest once: only what was seen outside the file tells, unless the client has it open."""
        old = data.draw(st.sampled_from(self.copies))
        if old != self.content and (self.ledger is not None or self.behind(old)):
            self.changed(old, replaced=replaced)

    def changed(self, content: bytes, *, replaced: bool = False) -> None:
        """Puts `content` there, sees it refused, and puts back what was there."""
        if replaced:
            (self.path.parent / "copy").write_bytes(content)
            (self.path.parent / "copy").replace(self.path)
        else:
            self.path.write_bytes(content)
            later = self.path.stat().st_mtime_ns + 10**9  # a clock that ticks slowly must not hide it
            os.utime(self.path, ns=(later, later))
        if self.ledger is not None:
            for attempt in (self.ledger.check, lambda: self.ledger.reserve("tampered", release(CHARGES[0]))):
                with pytest.raises(LedgerError):
                    attempt()
            self.ledger.close()
            self.ledger = None
            assert self.path.read_bytes() == content
        if self.content.startswith(content) and content.endswith(b"\n"):
            if self.behind(content):
                self.refused("an old copy was put back|not the one seen before")
        else:
            self.refused(self.path.name)
        self.path.write_bytes(self.content)

    # What must hold.

    def refused(self, why: str) -> None:
        anchor = self.anchor.read_bytes() if self.anchor and self.anchor.exists() else None
        with pytest.raises(LedgerError, match=why) as caught:
            self.opened(self.budget).close()
        assert "\n" not in str(caught.value)
        if anchor is not None and isinstance(caught.value, RolledBack):
            self.anchor.write_bytes(anchor)  # where only the server knew, the old copy has been opened

    def settle(self) -> None:
        """After a crash: what was asked for is there or is not, what was acknowledged is."""
        account = read(self.path)
        self.acknowledged |= {name: steps for name, steps in self.in_doubt.items() if name in account.messages}
        self.in_doubt = {}
        self.budget = account.budget

    @invariant()
    def holds(self) -> None:
        if not self.content:
            return
        type(self).steps += 1
        account = read(self.path)
        assert account.messages == set(self.acknowledged)
        assert self.spent <= account.epsilon_spent == self.epsilon()
        self.spent = account.epsilon_spent
        if self.ledger is not None:
            assert self.ledger.account.head == account.head
            assert self.ledger.account.epsilon_spent == account.epsilon_spent
        raw = self.path.read_bytes()
        assert raw.startswith(self.content)
        if raw != self.content:
            self.copies = [*self.copies[-4:], self.content]
            self.content = raw

    def message(self, again: bool) -> str:
        self.count += not again
        return f"m{self.count}"

    def head(self) -> Head:
        return Head(sequence=self.ledger.account.sequence, hash=self.ledger.account.head)

    def behind(self, content: bytes) -> bool:
        """Whether somebody outside has seen a later line than these."""
        anchored = writer._read_anchor(self.anchor) or Head(sequence=0, hash="")
        seen = self.seen.sequence if self.server else 0
        return content.count(b"\n") < max(anchored.sequence, seen)

    def epsilon(self, extra: int = 0) -> float:
        """Of all that was acknowledged, by the machine's own books."""
        steps = sum(self.acknowledged.values()) + extra
        one = release(1)
        spent = frozenset({((one.noise_multiplier, one.sample_rate), steps)} if steps else ())
        return accounting.epsilon(self.accounting, spent, one_delta())

    def teardown(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        if self.content:
            self.never_beyond()
        self._folder.cleanup()

    def never_beyond(self) -> None:
        """Each charge in the file was within the budget that the file says was in force."""
        entries = chain.read(self.path)
        account = Account(entries[:1], self.path)
        for entry in entries[1:]:
            account.apply(entry)
            if entry.kind == "reserve":
                assert account.epsilon_spent <= account.budget


def one_delta() -> float:
    return float(terms().delta)


@pytest.mark.timeout(600)
def test_any_order_of_events_keeps_the_claim() -> None:
    AnyOrder.steps = 0
    run_state_machine_as_test(AnyOrder, settings=quick)
    print(f"{AnyOrder.steps} steps")
    assert AnyOrder.steps >= STEPS


def forgets(self: Account, entry: chain.Entry, *, message: str, **_: Any) -> None:
    """A reservation counts once it is committed."""
    self.messages.add(message)
    self.open[entry.sequence] = release(_["steps"])


HOLES: dict[str, list[tuple[Any, str, Any]]] = {
    "every charge fits": [(Account, "epsilon_with", lambda *_: 0.0)],
    "what is not committed is free": [(Account, "_apply_reserve", forgets)],
    "hashes are not looked at": [(chain, "decode", lenient)],
    "anchors are not looked at": [(writer, "_read_anchor", lambda _: None), (Ledger, "require_head", lambda *_: None)],
    "other writers are not noticed": [(chain.Chain, "check", lambda _: None)],
    "the lock is not taken": [(chain.fcntl, "flock", lambda *_: None)],
    "acknowledged before it is written": [
        (chain.Chain, "append", lambda self, kind, body: chain.Entry.after(self.entries[-1], kind, body))
    ],
    "half of the line is enough": [(chain, "_write_all", lambda fd, data: os.write(fd, data[:-1]))],
    "a message may be charged twice": [(Account, "messages", property(lambda _: set(), lambda *_: None))],
}


@pytest.mark.parametrize("hole", HOLES)
def test_the_machine_finds_a_broken_ledger(monkeypatch: pytest.MonkeyPatch, hole: str) -> None:
    """Negative control, one for each guard that is taken out."""
    for target, name, value in HOLES[hole]:
        monkeypatch.setattr(target, name, value, raising=False)
    with pytest.raises((AssertionError, LedgerError, chain.ChainError, pytest.fail.Exception)):
        run_state_machine_as_test(AnyOrder, settings=settings(quick, phases=[Phase.generate]))
