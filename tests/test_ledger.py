"""The ledger: it charges before training, never forgets, and fails closed. What attacks it is in tests/attacks."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest

from client.ledger import BudgetExhausted, DuplicateMessage, Ledger, LedgerError, chain, create, read
from client.ledger.__main__ import main as command
from tests.federation import ROOT
from tests.ledgers import TERMS, mounted, opened, release, terms, used


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return used(tmp_path)


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
