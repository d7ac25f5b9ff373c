"""The ledger under faults, tampering and races: it charges before training, never forgets, and fails closed."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from client.accounting import Release
from client.ledger import (
    BudgetExhausted,
    DuplicateMessage,
    Head,
    Ledger,
    LedgerError,
    RolledBack,
    chain,
    create,
    read,
)
from client.ledger.__main__ import main as command
from common.config import Privacy

ROOT = Path(__file__).parent.parent
TERMS = {
    "epsilon": 4.0, "delta": 1e-5, "noise_multiplier": 1.5, "max_grad_norm": 1.0, "batch_size": 64, "records": 700,
    "max_steps_per_round": 11, "accounting": "adaptive",
}  # fmt: skip


# In memory where it can be: a kill loses no page that was written, so a disk would only make a long test slow.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


def terms(**changes: object) -> Privacy:
    return Privacy(**{**TERMS, **changes})


def release(steps: int = 11, privacy: Privacy | None = None) -> Release:
    privacy = privacy or terms()
    return Release(noise_multiplier=privacy.noise_multiplier, sample_rate=privacy.sample_rate, steps=steps)


@contextmanager
def opened(path: Path, anchor: Path | None = None, **changes: object) -> Iterator[Ledger]:
    ledger = Ledger.open(path, partition="a", privacy=terms(**changes), anchor=anchor)
    try:
        yield ledger
    finally:
        ledger.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with two committed rounds and one that was never committed."""
    path = tmp_path / "a/ledger.jsonl"
    create(path, partition="a", privacy=terms())
    with opened(path) as ledger:
        for message in ("m1", "m2"):
            ledger.commit(ledger.reserve(message, release()))
        ledger.reserve("m3", release())
    return path


def test_charges_outlive_their_process(path: Path) -> None:
    before = read(path)
    assert (len(before.messages), before.commits) == (3, 2)
    assert before.epsilon_reserved > 0
    with opened(path) as ledger:
        assert ledger.account.epsilon_spent == before.epsilon_spent
        assert ledger.account.epsilon_reserved == before.epsilon_reserved  # spent for good, never given back
        with pytest.raises(DuplicateMessage):
            ledger.reserve("m1", release())
        with pytest.raises(DuplicateMessage):
            ledger.reserve("m3", release())
        with pytest.raises(LedgerError, match="no open reservation"):
            ledger.commit(3)
    assert read(path).epoch == before.epoch + 1


def test_nothing_is_charged_beyond_the_budget(path: Path) -> None:
    with opened(path) as ledger:
        size = path.stat().st_size
        with pytest.raises(BudgetExhausted, match="the budget is 4 at delta 1e-05"):
            ledger.reserve("m4", release(steps=5000))
        assert path.stat().st_size == size
        ledger.reserve("m4", release(steps=1))


def test_the_owner_changes_the_budget_and_nothing_else(path: Path) -> None:
    with opened(path, epsilon=9.0) as ledger:
        assert ledger.account.budget == 9.0
    with opened(path, epsilon=0.1) as ledger, pytest.raises(BudgetExhausted):
        ledger.reserve("m4", release(steps=1))
    kinds = [entry.kind for entry in chain.read(path)]
    assert kinds.count("budget") == 2
    for changes, word in (({"delta": 1e-6}, "delta"), ({"accounting": "fixed"}, "accounting")):
        with pytest.raises(LedgerError, match=word), opened(path, **changes):
            pass
    with pytest.raises(LedgerError, match="partition"):
        Ledger.open(path, partition="b", privacy=terms())


def test_a_fixed_ledger_keeps_its_mechanism(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    create(path, partition="a", privacy=terms(accounting="fixed"))
    with opened(path, accounting="fixed") as ledger:
        ledger.reserve("m1", release())
        with pytest.raises(LedgerError, match="fixed ledger"):
            ledger.reserve("m2", release(privacy=terms(noise_multiplier=3.0)))
    for changes, word in (({"noise_multiplier": 3.0}, "noise_multiplier"), ({"batch_size": 32}, "sample_rate")):
        with pytest.raises(LedgerError, match=word), opened(path, accounting="fixed", **changes):
            pass


def test_every_changed_byte_is_found(path: Path) -> None:
    raw = path.read_bytes()
    for position in range(len(raw)):
        for flip in (0x01, 0x20):
            edited = bytearray(raw)
            edited[position] ^= flip
            with pytest.raises(chain.ChainError) as caught:
                chain.decode(bytes(edited), path)
            assert "\n" not in str(caught.value)


def test_every_dropped_swapped_or_torn_line_is_found(path: Path) -> None:
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    for index in range(len(lines) - 1):  # the last one's absence only an anchor can tell
        with pytest.raises(chain.ChainError):
            chain.decode(b"".join(lines[:index] + lines[index + 1 :]), path)
    for left in range(len(lines)):
        for right in range(left):
            swapped = list(lines)
            swapped[left], swapped[right] = swapped[right], swapped[left]
            with pytest.raises(chain.ChainError):
                chain.decode(b"".join(swapped), path)
    for length in range(len(raw)):
        if raw[:length].endswith(b"\n"):
            continue  # whole lines are missing: see the anchors
        with pytest.raises(chain.ChainError):
            chain.decode(raw[:length], path)


def test_a_forged_line_must_make_sense(path: Path) -> None:
    """Who can compute hashes can extend the chain, but not with what no client would write."""
    entries = chain.read(path)
    reserve = {"message": "x", "noise_multiplier": 1.5, "sample_rate": 0.1, "steps": 1}
    for kind, body in (
        ("commit", {"reservation": 3}), ("commit", {"reservation": 99}), ("open", {"epoch": 7}), ("refund", {}),
        ("create", {}), ("reserve", {**reserve, "message": "m1"}), ("reserve", {**reserve, "steps": -5}),
        ("reserve", {**reserve, "noise_multiplier": float("1e308")}), ("budget", {"epsilon": -1.0}),
        ("budget", {"epsilon": "8"}), ("reserve", {}),
    ):  # fmt: skip
        forged = chain.Entry.after(entries[-1], kind, body)
        path.write_bytes(b"".join(entry.encode() for entry in [*entries, forged]))
        with pytest.raises(LedgerError, match="not valid here"):
            read(path)


def test_what_is_only_shown_must_make_sense_too(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One partition's forged ledger must not cost the others their metrics."""
    create(tmp_path / "good.jsonl", partition="a", privacy=terms())
    body = chain.read(tmp_path / "good.jsonl")[0].body
    for name in ("ledger", "partition"):
        forged = tmp_path / f"{name}.jsonl"
        chain.create(forged, "create", {**body, name: 5})
        with pytest.raises(LedgerError, match="not valid here"):
            read(forged)
    entries = chain.read(path)
    monkeypatch.setattr(chain, "datetime", Mock(**{"now.return_value.isoformat.return_value": "yesterday"}))
    late = chain.Entry.after(entries[-1], "open", {"epoch": 2})
    path.write_bytes(b"".join(entry.encode() for entry in [*entries, late]))
    with pytest.raises(LedgerError, match=r"not valid here.*yesterday"):
        read(path)


def test_an_old_copy_is_found_by_the_anchor_file_and_by_the_server(tmp_path: Path, path: Path) -> None:
    anchor = tmp_path / "elsewhere/a.json"
    with opened(path, anchor) as ledger:
        old = path.read_bytes()
        ledger.commit(ledger.reserve("m4", release()))
        seen = Head(sequence=ledger.account.sequence, hash=ledger.account.head)
        ledger.require_head(seen)
        ledger.require_head(Head(sequence=0, hash=""))
    path.write_bytes(old)  # whole lines are missing at the end
    with pytest.raises(RolledBack, match="an old copy was put back"), opened(path, anchor):
        pass
    with opened(path) as ledger:  # without the anchor file the server's memory tells
        with pytest.raises(RolledBack):
            ledger.require_head(seen)
        ledger.reserve("other", release(steps=1))
        ledger.reserve("another", release(steps=1))
        with pytest.raises(RolledBack, match="not the one seen before"):
            ledger.require_head(seen)
        with pytest.raises(RolledBack):
            ledger.require_head(Head(sequence=-1, hash=""))


def test_every_cut_between_lines_is_found_by_the_anchor(tmp_path: Path, path: Path) -> None:
    anchor = tmp_path / "elsewhere/a.json"
    with opened(path, anchor):
        pass
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(LedgerError) as caught, opened(path, anchor):
            pass
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, RolledBack) == (kept > 0)  # an empty file is none of ours
    path.write_bytes(b"".join(lines))
    with opened(path, anchor):
        pass


WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
from client.ledger import Ledger, LedgerError, create
from common.config import Privacy
privacy, path = Privacy(**eval(sys.argv[1])), Path("ledger.jsonl")
if os.getuid() == 0:
    os.setuid(65534)
for act in (
    lambda: Ledger.open(path, partition="a", privacy=privacy),
    lambda: create(Path("new/ledger.jsonl"), partition="a", privacy=privacy),
):
    try:
        act()
    except LedgerError as error:
        print(error)
"""


def test_without_the_right_to_write_nothing_is_opened_or_created(path: Path) -> None:
    before = path.read_bytes()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        output = subprocess.check_output(
            [sys.executable, "-c", WITHOUT_RIGHTS, repr(TERMS)],
            cwd=path.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )
    finally:
        path.parent.chmod(0o755)
    lines = output.splitlines()
    assert len(lines) == 2
    assert all(line.endswith(": Permission denied") for line in lines)
    assert path.read_bytes() == before


def test_what_is_missing_is_never_made_anew(tmp_path: Path, path: Path) -> None:
    anchor = tmp_path / "elsewhere/a.json"
    with opened(path, anchor):
        pass
    path.unlink()
    with pytest.raises(LedgerError, match="missing"), opened(path, anchor):
        pass
    with pytest.raises(LedgerError, match="used before"):
        create(path, partition="a", privacy=terms(), anchor=anchor)
    assert not path.exists()
    anchor.write_text("{}")
    with pytest.raises(LedgerError, match="not a ledger's anchor"):
        create(path, partition="a", privacy=terms(), anchor=anchor)
    create(tmp_path / "b.jsonl", partition="a", privacy=terms())
    with pytest.raises(LedgerError, match="exists already"):
        create(tmp_path / "b.jsonl", partition="a", privacy=terms())


HOLD = """
import sys
from client.ledger import Ledger
from common.config import Privacy
ledger = Ledger.open(__import__("pathlib").Path(sys.argv[1]), partition="a", privacy=Privacy(**eval(sys.argv[2])))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), repr(TERMS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(LedgerError, match="another client holds it"), opened(path):
            pass
    finally:
        first.kill()
        first.communicate()
    with opened(path):
        pass


def test_another_writer_is_noticed_before_anything_is_done(path: Path) -> None:
    with opened(path) as ledger:
        reservation = ledger.reserve("m4", release())
        foreign = chain.Entry.after(chain.read(path)[-1], "open", {"epoch": 3})
        with path.open("ab") as file:  # a client that the lock did not stop: a cloned volume, a lost lock
            file.write(foreign.encode())
        for act in (ledger.check, lambda: ledger.commit(reservation), lambda: ledger.reserve("m5", release())):
            with pytest.raises(LedgerError, match="changed by another writer"):
                act()
    assert read(path).head == foreign.hash  # and nothing was written over


def test_a_line_that_came_between_the_check_and_the_write_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = chain.Entry.after(chain.read(path)[-1], "open", {"epoch": 2}).encode()

    def meanwhile(*_: int) -> None:
        with path.open("ab") as file:
            file.write(foreign)

    with opened(path) as ledger:
        monkeypatch.setattr(chain, "_reserve_space", meanwhile)
        with pytest.raises(LedgerError, match="changed by another writer"):
            ledger.reserve("m4", release())
    with pytest.raises(LedgerError):
        read(path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"sequence":1,"time":"","kind":"create","x":NaN,"prev":"","hash":""}',
        b'{"sequence":1,"time":"","kind":"create","x":1e999,"prev":"","hash":""}',
        b"[" * 100_000,
        b"\xff",
        b"null",
        b"[]",
        b"{}",
    ],
)
def test_a_line_that_json_or_python_chokes_on_is_one_clear_error(path: Path, line: bytes) -> None:
    path.write_bytes(line + b"\n")
    for act in (lambda: read(path), lambda: Ledger.open(path, partition="a", privacy=terms())):
        with pytest.raises(LedgerError, match="line 1: not an entry"):
            act()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sequence": "9", "hash": ""}', '{"sequence": 9, "hash": null}'])
def test_an_anchor_that_is_none_is_refused(tmp_path: Path, path: Path, text: str) -> None:
    anchor = tmp_path / "a.json"
    anchor.write_text(text)
    with pytest.raises(LedgerError, match="not a ledger's anchor"), opened(path, anchor):
        pass


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own at `folder`; skips the test where this user may not have one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_charged(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=32k"):
        path, filler = tmp_path / "disk/ledger.jsonl", tmp_path / "disk/filler"
        create(path, partition="a", privacy=terms())
        filler.write_bytes(bytes(16_000))
        charged: list[str] = []
        with opened(path) as ledger:

            def fill() -> None:
                for number in range(1000):
                    ledger.reserve(f"m{number}", release(steps=1))
                    charged.append(f"m{number}")

            with pytest.raises(LedgerError, match="No space left on device"):
                fill()
            with pytest.raises(LedgerError, match="No space left on device"):
                ledger.reserve("again", release(steps=1))
        assert len(charged) > 3
        assert read(path).messages == set(charged)
        filler.unlink()
        with opened(path) as ledger:
            assert ledger.account.messages == set(charged)
            ledger.commit(ledger.reserve("the next", release(steps=1)))


def test_a_read_only_disk_is_refused_and_still_read(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k"):
        path = tmp_path / "disk/ledger.jsonl"
        create(path, partition="a", privacy=terms())
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(LedgerError, match="Read-only file system"), opened(path):
            pass
        with pytest.raises(LedgerError, match="Read-only file system"):
            create(tmp_path / "disk/other.jsonl", partition="b", privacy=terms())
        assert read(path).epsilon_spent == 0


def test_a_replaced_or_vanished_file_is_noticed(tmp_path: Path, path: Path) -> None:
    with opened(path) as ledger:
        (tmp_path / "copy").write_bytes(path.read_bytes())
        (tmp_path / "copy").replace(path)
        with pytest.raises(LedgerError, match="replaced by another file"):
            ledger.reserve("m4", release())
    with opened(path) as ledger:
        path.unlink()
        with pytest.raises(LedgerError, match="No such file"):
            ledger.reserve("m4", release())


def test_a_touched_file_is_still_the_same(path: Path) -> None:
    with opened(path) as ledger:
        os.utime(path)
        ledger.commit(ledger.reserve("m4", release()))


def test_the_last_of_the_budget_is_given_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    create(path, partition="a", privacy=terms())
    with opened(path) as ledger:
        fits = ledger.account.rounds_remaining(release())
        granted: list[str] = []
        start = threading.Barrier(16)

        def take(name: str) -> None:
            start.wait()
            for turn in range(fits):
                with suppress(BudgetExhausted):
                    ledger.reserve(f"{name}-{turn}", release())
                    granted.append(name)

        threads = [threading.Thread(target=take, args=(str(number),)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(granted) == fits
    account = read(path)
    assert account.epsilon_spent <= account.budget < account.epsilon_with(release())


def test_the_clock_decides_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime(1999, 1, 1, tzinfo=tz)  # type: ignore[arg-type]

    monkeypatch.setattr(chain, "datetime", Clock)
    spent = read(path).epsilon_spent
    with opened(path) as ledger:
        ledger.reserve("m4", release())
    account = read(path)
    assert account.last_time.startswith("1999")
    assert account.epsilon_spent > spent


def test_every_system_call_may_fail_or_be_the_last() -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        output = subprocess.check_output(
            [sys.executable, "-m", "tests.ledger_faults", folder],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    found = json.loads(output)
    counts = {life: {len(calls) for calls in kinds.values()} for life, kinds in found["walks"].items()}
    print("system calls walked through, each with", len(found["walks"]["serving"]), "kinds of fault:", counts)
    assert counts == {"starting": {10}, "serving": {74}}
    assert found["full"] > 50  # each number of bytes short of a line
    assert found["wrong"] == []


@pytest.mark.parametrize("broken", ["forgets", "tears"])
def test_the_walk_finds_a_broken_ledger(tmp_path: Path, broken: str) -> None:
    """Its negative control: a ledger that acknowledges what it did not write, or that writes half a line."""
    breaks = {
        "forgets": "chain.Chain.append = lambda self, kind, body: chain.Entry.after(self.entries[-1], kind, body)",
        "tears": "chain._write_all = lambda fd, data: os.write(fd, data[:-1])",
    }[broken]
    code = f"import os, sys; from pathlib import Path; from client.ledger import chain; {breaks}; from tests import"
    code += " ledger_faults; ledger_faults.main(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0 or json.loads(done.stdout)["wrong"]


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, epsilon never falls and never exceeds the budget it was charged under."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.path = Path(self.folder.name) / "ledger.jsonl"
        self.ledger: Ledger | None = None
        self.spent = 0.0
        self.largest = 4.0
        self.count = 0

    @initialize(accounting=st.sampled_from(["fixed", "adaptive"]))
    def start(self, accounting: str) -> None:
        self.accounting = accounting
        create(self.path, partition="a", privacy=self.terms(4.0))

    def terms(self, epsilon: float) -> Privacy:
        return terms(epsilon=epsilon, accounting=self.accounting)

    @rule(epsilon=st.sampled_from([0.5, 4.0, 6.0]))
    @precondition(lambda self: self.ledger is None)
    def open(self, epsilon: float) -> None:
        self.ledger = Ledger.open(self.path, partition="a", privacy=self.terms(epsilon))
        self.largest = max(self.largest, epsilon)

    @rule(steps=st.integers(1, 60), again=st.booleans())
    @precondition(lambda self: self.ledger is not None)
    def reserve(self, steps: int, again: bool) -> None:
        self.count += not again
        charged = f"m{self.count}" in self.ledger.account.messages
        try:
            self.ledger.reserve(f"m{self.count}", release(steps))
        except DuplicateMessage:
            assert charged
        except BudgetExhausted:
            assert self.ledger.account.epsilon_with(release(steps)) > self.ledger.account.budget
        else:
            assert not charged
            assert self.ledger.account.epsilon_spent <= self.ledger.account.budget

    @rule(data=st.data())
    @precondition(lambda self: self.ledger is not None and self.ledger.account.open)
    def commit(self, data: st.DataObject) -> None:
        self.ledger.commit(data.draw(st.sampled_from(sorted(self.ledger.account.open))))

    @rule()
    @precondition(lambda self: self.ledger is not None)
    def crash(self) -> None:
        self.ledger.close()
        self.ledger = None

    @rule()
    @precondition(lambda self: self.ledger is None)
    def tear(self) -> None:
        raw = self.path.read_bytes()
        self.path.write_bytes(raw[:-1])
        with pytest.raises(LedgerError):
            Ledger.open(self.path, partition="a", privacy=self.terms(4.0))
        self.path.write_bytes(raw)

    @invariant()
    def holds(self) -> None:
        if self.path.exists():
            account = read(self.path)
            assert self.spent <= account.epsilon_spent <= self.largest
            if self.ledger:
                assert self.ledger.account.epsilon_spent == account.epsilon_spent
            self.spent = account.epsilon_spent

    def teardown(self) -> None:
        if self.ledger:
            self.ledger.close()
        self.folder.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.long
class TestManyOrders(AnyOrder.TestCase):
    """Ten thousand steps of it."""

    settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_the_command_line(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["show", str(path)]) == 0
    assert capsys.readouterr().out.startswith("a has spent epsilon ")
    assert command(["show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is True
    assert shown["epsilon_spent"] == read(path).epsilon_spent
    assert command(["verify", str(path)]) == 0
    assert "ok, 7 lines" in capsys.readouterr().out

    path.write_bytes(path.read_bytes()[:-3])
    assert command(["verify", str(path)]) == 1
    error = capsys.readouterr().err
    assert "torn" in error
    assert error.count("\n") == 1
    assert command(["show", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False

    policy = tmp_path / "policy.yaml"
    policy.write_text(f"privacy: {json.dumps({**TERMS, 'delta': 0.00001})}\npartitions: [{{name: a}}]\n")
    policy.write_text(policy.read_text().replace("1e-05", "1.0e-5"))
    arguments = ["create", str(tmp_path / "new/ledger.jsonl"), "--policy", str(policy)]
    assert command([*arguments, "--partition", "b"]) == 1
    assert "no 'b' there" in capsys.readouterr().err
    assert command([*arguments, "--partition", "a"]) == 0
    assert command([*arguments, "--partition", "a"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert command([*arguments, "--partition", "a", "--json"]) == 1
    assert "exists already" in json.loads(capsys.readouterr().out)["error"]
    for verb in ("show", "verify"):
        assert command([verb, str(tmp_path / "absent")]) == 1
        assert capsys.readouterr().err == f"{tmp_path}/absent: No such file or directory\n"


def test_the_command_is_a_program(tmp_path: Path, path: Path) -> None:
    for target, code in ((path, 0), (tmp_path / "absent", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "client.ledger", "verify", str(target), "--json"],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert done.returncode == code
        assert json.loads(done.stdout)["ok"] is (code == 0)
        assert done.stderr == b""
