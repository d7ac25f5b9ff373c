"""`python -m local`: parameters become terms or one clear line; nothing outlives a run; no budget starts over."""

import fcntl
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from client import ledger
from client.accounting import Release, compose, epsilon
from common.config import Federation, Policy, Privacy, load
from local import display, parameters, runner, steps
from local.errors import LocalError
from local.preparation import FEDERATION, POLICY, prepare
from local.progress import Progress
from local.records import nominal_records
from server import history
from tests.federation import ROOT, descendants, free_ports

DIGITS = 1437  # records to train on


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's own config, moved to free ports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fleet, control, server, client = free_ports(4)
    addresses = {
        "federation": {
            "server": {
                "fleet_address": f"127.0.0.1:{fleet}",
                "control_port": control,
                "metrics_address": f"127.0.0.1:{server}",
            }
        },
        "policy": {"client": {"server_address": f"127.0.0.1:{fleet}", "metrics_address": f"127.0.0.1:{client}"}},
    }
    (tmp_path / "config").mkdir()
    for name, section in addresses.items():
        content = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())
        (tmp_path / f"config/{name}.yaml").write_text(yaml.safe_dump(content | section))
    return tmp_path


def local(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m local` in the working directory, with nobody at a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "local", *arguments],
        stdin=options.pop("stdin", subprocess.DEVNULL),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def refused(line: str, *arguments: str, code: int = 2) -> None:
    """It says `line` and nothing else, and starts nothing."""
    ended = local(*arguments)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not Path("state/logs").exists()


# --- parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ROUND=5"], "ROUND=5: unknown parameter 'ROUND' (did you mean ROUNDS?)"),
        (["rounds=5"], "did you mean ROUNDS?"),
        (["XYZ=5"], "expected one of CLIENTS, MIN_CLIENTS, FIT_CLIENTS"),
        (["ROUNDS"], "ROUNDS: expected NAME=VALUE"),
        (["ROUNDS="], "ROUNDS=: expected a whole number of at least 1"),
        (["ROUNDS=0"], "ROUNDS=0: expected a whole number of at least 1"),
        (["ROUNDS=-3"], "ROUNDS=-3: expected a whole number of at least 1"),
        (["ROUNDS=2.5"], "ROUNDS=2.5: expected a whole number of at least 1"),
        (["ROUNDS=99999999999"], "ROUNDS=99999999999: expected a whole number"),
        (["EPSILON=inf"], "EPSILON=inf: expected a number above 0"),
        (["EPSILON=nan"], "EPSILON=nan: expected a number above 0"),
        (["LR=0"], "LR=0: expected a number above 0"),
        (["NOISE_MULTIPLIER=-1"], "NOISE_MULTIPLIER=-1: expected a number above 0"),
        (["MAX_GRAD_NORM=much"], "MAX_GRAD_NORM=much: expected a number above 0"),
        (["TASK=digit"], "TASK=digit: unknown task (expected digits,"),
        (["LR=1", "LR=2"], "LR=2: LR is given twice"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments: list[str], line: str) -> None:
    with pytest.raises(LocalError) as error:
        parameters.read(arguments)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def apply(*arguments: str, size: Callable[[int], int] = lambda n: DIGITS // n) -> tuple[Federation, Policy]:
    return parameters.apply(
        parameters.read(arguments),
        load(Federation, ROOT / "config/federation.yaml"),
        load(Policy, ROOT / "config/policy.yaml"),
        lambda _task, _root, partitions: size(partitions),
    )


def test_all_of_the_ancestors_parameters_arrive() -> None:
    federation, policy = apply(
        "CLIENTS=10", "MIN_CLIENTS=8", "FIT_CLIENTS=5", "ROUNDS=20", "BATCH_SIZE=64", "PHYSICAL_BATCH_SIZE=32",
        "LR=1.0", "NOISE_MULTIPLIER=1.2", "MAX_GRAD_NORM=1.0", "EPSILON=3.0", "TASK=digits",
    )  # fmt: skip
    assert [partition.name for partition in policy.partitions] == [f"digits-{i}-of-10" for i in range(10)]
    assert [(partition.index, partition.of) for partition in policy.partitions] == [(i, 10) for i in range(10)]
    assert (federation.min_clients, federation.fit_clients, federation.rounds) == (8, 5, 20)
    assert federation.learning_rate == 1.0
    privacy = policy.privacy
    assert (privacy.batch_size, privacy.records, privacy.epsilon) == (64, 143, 3.0)
    assert (privacy.noise_multiplier, privacy.max_grad_norm) == (1.2, 1.0)
    assert policy.training.physical_batch_size == 32
    assert federation.steps_per_round == privacy.max_steps_per_round == 1  # an epoch of 3 costs more than 3.0 at once
    assert steps.explain(federation, policy).startswith("1 local step a round: an epoch of 3 would cost epsilon ")


def test_a_round_is_an_epoch_where_the_budget_covers_it() -> None:
    for arguments in (["BATCH_SIZE=32"], ["BATCH_SIZE=32", "ROUNDS=40"], ["CLIENTS=4", "EPSILON=2"]):
        federation, policy = apply(*arguments)
        privacy, rounds = policy.privacy, steps.rounds_each(federation, len(policy.partitions))

        def cost(taken: int, privacy: Privacy = privacy, rounds: int = rounds) -> float:
            one = Release(
                noise_multiplier=privacy.noise_multiplier, sample_rate=privacy.sample_rate, steps=taken * rounds
            )
            return epsilon("adaptive", compose([one]), privacy.delta)

        taken = federation.steps_per_round
        assert taken == privacy.max_steps_per_round
        assert cost(taken) <= privacy.epsilon or taken == 1
        assert taken == steps.epoch(privacy) or cost(taken + 1) > privacy.epsilon


def test_without_parameters_the_files_hold_and_no_task_is_loaded() -> None:
    def ask(_: int) -> int:
        raise AssertionError("the split is the files' own")

    assert apply(size=ask) == (
        load(Federation, ROOT / "config/federation.yaml"),
        load(Policy, ROOT / "config/policy.yaml"),
    )


def test_local_ledgers_are_adaptive_whatever_the_file_says() -> None:
    policy = load(Policy, ROOT / "config/policy.yaml")
    fixed = policy.model_copy(update={"privacy": policy.privacy.model_copy(update={"accounting": "fixed"})})
    federation = load(Federation, ROOT / "config/federation.yaml")
    _, applied = parameters.apply(parameters.read([]), federation, fixed, lambda *_: 0)
    assert applied.privacy.accounting == "adaptive"


@pytest.mark.parametrize(
    ("arguments", "least", "fit"),
    [
        ([], 2, 2),
        (["CLIENTS=7"], 7, 7),
        (["CLIENTS=7", "MIN_CLIENTS=4"], 4, 4),
        (["CLIENTS=7", "FIT_CLIENTS=3"], 7, 3),
        (["MIN_CLIENTS=1"], 1, 1),
        (["FIT_CLIENTS=1"], 2, 1),
    ],
)
def test_how_many_clients_a_round_takes(arguments: list[str], least: int, fit: int) -> None:
    federation, _ = apply(*arguments)
    assert (federation.min_clients, federation.fit_clients) == (least, fit)


def test_a_batch_size_that_nobody_asked_for_shrinks_to_the_partition() -> None:
    federation, policy = apply("CLIENTS=300")
    assert policy.privacy.batch_size == policy.privacy.records == 4
    assert federation.steps_per_round == 1


def test_a_task_of_ones_own_has_partitions_with_valid_names() -> None:
    _, policy = apply("TASK=My.Tasks:Own", "CLIENTS=2")
    assert [partition.name for partition in policy.partitions] == ["my.tasks-own-0-of-2", "my.tasks-own-1-of-2"]
    assert policy.task == "My.Tasks:Own"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["MIN_CLIENTS=3"], "MIN_CLIENTS=3: expected at most 2 (CLIENTS"),
        (["FIT_CLIENTS=3"], "FIT_CLIENTS=3: expected at most 2 (MIN_CLIENTS"),
        (["CLIENTS=9", "MIN_CLIENTS=4", "FIT_CLIENTS=5"], "FIT_CLIENTS=5: expected at most 4 (MIN_CLIENTS"),
        (["BATCH_SIZE=719"], "BATCH_SIZE=719: expected at most 718 (the nominal records of a partition)"),
        (["CLIENTS=100", "BATCH_SIZE=15"], "BATCH_SIZE=15: expected at most 14"),
        (["LR=1e9"], "LR=1000000000.0: expected at most 1000.0 (training.max_learning_rate)"),
    ],
)
def test_parameters_that_do_not_go_together_are_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(LocalError) as error:
        apply(*arguments)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_files_of_different_tasks_are_refused() -> None:
    policy = load(Policy, ROOT / "config/policy.yaml").model_copy(update={"task": "cifar10"})
    federation = load(Federation, ROOT / "config/federation.yaml")
    with pytest.raises(LocalError, match=r"federation.yaml has 'digits', policy.yaml 'cifar10'"):
        parameters.apply(parameters.read([]), federation, policy, lambda *_: 0)


def test_the_task_says_how_many_records_a_partition_has() -> None:
    assert nominal_records("digits", Path("data"), 10) == 143
    with pytest.raises(LocalError, match=r"TASK=digits CLIENTS=5000: .*1437"):
        nominal_records("digits", Path("data"), 5000)
    with pytest.raises(LocalError, match=r"TASK=no\.such:Thing CLIENTS=2: .*cannot import"):
        nominal_records("no.such:Thing", Path("data"), 2)


# --- preparation ------------------------------------------------------------------------------------------


def ledgers(policy: Policy) -> dict[str, bytes]:
    return {part.name: policy.ledger_path(part.name).read_bytes() for part in policy.partitions}


@pytest.mark.usefixtures("place")
def test_a_first_run_finds_all_it_needs() -> None:
    federation, policy = prepare(parameters.read(["EPSILON=2.5"]))
    assert load(Federation, FEDERATION) == federation
    assert load(Policy, POLICY) == policy
    for partition in policy.partitions:
        account = ledger.read(policy.ledger_path(partition.name))
        assert (account.partition, account.mode, account.budget) == (partition.name, "adaptive", 2.5)
        assert (account.epsilon_spent, account.delta) == (0.0, policy.privacy.delta)
        assert policy.key_path(partition.name).stat().st_mode & 0o777 == 0o600
    assert federation.server.certificate.exists()
    assert [path.stem for path in sorted(federation.server.public_keys.iterdir())] == [
        "digits-0-of-2",
        "digits-1-of-2",
    ]


@pytest.mark.usefixtures("place")
def test_another_run_goes_on_with_the_same_ledgers_and_keys() -> None:
    _, policy = prepare(parameters.read([]))
    before, key = ledgers(policy), policy.key_path("digits-0-of-2").read_bytes()
    prepare(parameters.read(["EPSILON=1", "ROUNDS=9"]))
    assert ledgers(policy) == before
    assert policy.key_path("digits-0-of-2").read_bytes() == key


def test_another_split_has_ledgers_of_its_own_and_only_its_keys_are_registered(place: Path) -> None:
    prepare(parameters.read([]))
    federation, policy = prepare(parameters.read(["CLIENTS=3"]))
    names = {f"digits-{i}-of-3" for i in range(3)}
    assert set(ledgers(policy)) == names
    assert {path.stem for path in federation.server.public_keys.iterdir()} == names
    assert len(list((place / "state/clients").iterdir())) == 5


@pytest.mark.usefixtures("place")
def test_a_lost_ledger_is_not_a_new_budget() -> None:
    _, policy = prepare(parameters.read([]))
    lost = policy.ledger_path("digits-1-of-2")
    lost.unlink()
    refused("state/clients/digits-1-of-2/ledger.jsonl: missing", "run")
    assert not lost.exists()


def test_a_crash_between_ledger_and_key_is_harmless(place: Path) -> None:
    _, policy = prepare(parameters.read([]))
    policy.key_path("digits-1-of-2").unlink()
    (place / "state/pki/public/clients/digits-1-of-2.pub").unlink()
    before = ledgers(policy)
    prepare(parameters.read([]))
    assert policy.key_path("digits-1-of-2").exists()
    assert ledgers(policy) == before


@pytest.mark.parametrize("address", ["fleet_address", "control_port", "metrics_address"])
def test_a_port_that_is_taken_is_one_line_and_nothing_is_made(place: Path, address: str) -> None:
    server = load(Federation, Path("config/federation.yaml")).server
    port = int(str(getattr(server, address)).rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        refused(f"server.{address}: cannot listen on 127.0.0.1:{port}", "run")
        refused("another run may be active", "run")
    assert [path.name for path in (place / "state").iterdir()] == ["run.lock"]


@pytest.mark.usefixtures("place")
def test_ports_that_do_not_meet_are_one_line() -> None:
    content = yaml.safe_load(Path("config/policy.yaml").read_text())
    content["client"]["server_address"] = "127.0.0.1:1"
    Path("config/policy.yaml").write_text(yaml.safe_dump(content))
    refused("client.server_address: 127.0.0.1:1 in policy.yaml", "run")


@pytest.mark.usefixtures("place")
def test_a_wrong_value_is_refused_before_there_is_any_state() -> None:
    refused("EPSILON=lots: expected a number above 0", "run", "EPSILON=lots")
    assert not Path("state").exists()


@pytest.mark.usefixtures("place")
def test_a_full_disk_is_one_line() -> None:
    Path("state/config").mkdir(parents=True)
    FEDERATION.with_name(f".{FEDERATION.name}.new").symlink_to("/dev/full")  # where it is written first
    refused("no space left on the disk of state", "run", code=1)


# --- one at a time, and forgetting ------------------------------------------------------------------------


@pytest.fixture
def other_run(place: Path) -> Iterator[None]:
    (place / "state").mkdir()
    with (place / "state/run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.usefixtures("other_run")
@pytest.mark.parametrize("arguments", [["run"], ["forget"], ["forget", "--yes"]])
def test_beside_another_run_nothing_is_touched(arguments: list[str]) -> None:
    refused("another run is active in this directory", *arguments)
    assert os.listdir("state") == ["run.lock"]


@pytest.mark.usefixtures("place")
def test_forget_wants_somebody_to_ask() -> None:
    _, policy = prepare(parameters.read([]))
    before = ledgers(policy)
    ended = local("forget")
    assert ended.returncode == 2
    assert "nobody can be asked" in ended.stderr
    assert ledgers(policy) == before


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("answer", "gone"), [("forget", True), ("yes", False), ("", False)])
def test_forget_asks_and_obeys(answer: str, gone: bool) -> None:
    prepare(parameters.read([]))
    Path("runs/r1").mkdir(parents=True)
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    ended = local("forget", stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert ended.returncode == 0
    assert "digits-0-of-2: 0.000 of epsilon 8 at delta 1e-05" in ended.stdout
    assert (os.listdir("state") == []) == gone
    assert Path("runs/r1").exists()


@pytest.mark.usefixtures("place")
def test_after_forgetting_a_run_starts_anew_and_a_broken_ledger_does_not_stop_it() -> None:
    _, policy = prepare(parameters.read([]))
    policy.ledger_path("digits-0-of-2").write_text("nonsense\n")
    ended = local("forget", "--yes")
    assert ended.returncode == 0, ended.stderr
    assert "digits-0-of-2/ledger.jsonl" in ended.stdout
    _, policy = prepare(parameters.read([]))
    assert ledger.read(policy.ledger_path("digits-0-of-2")).epsilon_spent == 0


# --- processes --------------------------------------------------------------------------------------------

STUBBORN = """
import os, pathlib, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path("new").write_text(f"{os.getpid()} {child.pid}")
pathlib.Path("new").rename("pids")
time.sleep(600)
"""
DRIVER = """
import pathlib, sys, time
from local import runner
runner._END_SECONDS = 1
runner.catch_signals()
try:
    with runner.Programs(pathlib.Path("logs")) as programs:
        programs.start("stubborn")
        time.sleep(600)
except runner.Stopped:
    sys.exit(130)
"""


@pytest.fixture
def driver(place: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A runner of one program that ignores SIGTERM and has a child in another session; both their ids."""
    (place / "stubborn.py").write_text(STUBBORN)
    process = subprocess.Popen([sys.executable, "-c", DRIVER])
    eventually(Path("pids").exists)
    pids = [int(pid) for pid in Path("pids").read_text().split()]
    assert all(map(alive, pids))
    yield process, pids
    process.kill()
    process.wait()
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_process_that_was_started(
    driver: tuple[subprocess.Popen[bytes], list[int]], number: signal.Signals
) -> None:
    process, pids = driver
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # an impatient second one changes nothing
    assert process.wait(30) == 130
    assert not any(map(alive, pids))


def test_the_orphans_of_a_killed_program_are_ended(
    driver: tuple[subprocess.Popen[bytes], list[int]],
) -> None:
    process, (program, orphan) = driver
    os.kill(program, signal.SIGKILL)
    time.sleep(0.2)
    assert alive(orphan)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not alive(orphan)


def test_a_program_dies_with_its_killed_runner(driver: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    process, (program, _) = driver
    process.kill()
    eventually(lambda: not alive(program))


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "says nothing"),
        ("one\ntwo\n\n", "two"),
        ("2026-01-01T00:00:00Z ERROR client: no disk\nbye\n", "ERROR client: no disk"),
        ("python -m server: task: unknown\nbye\n", "python -m server: task: unknown"),
        ("Traceback:\n  File\nflwr.Errors.NodeError: no\n\n", "flwr.Errors.NodeError: no"),
        ("\x1b[93mWARNING \x1b[0m: it\n", "WARNING : it"),
        ("x" * 100_000 + "\nlast\n", "last"),
    ],
)
def test_the_last_error_of_a_log(tmp_path: Path, log: str, line: str) -> None:
    (tmp_path / "log").write_text(log)
    assert runner.last_error(tmp_path / "log").endswith(line)


# --- whole runs -------------------------------------------------------------------------------------------


def last_summary() -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(Path("runs/latest/summary.json").read_text())
    return summary


def spent() -> list[float]:
    return [row["epsilon_spent"] for row in last_summary()["partitions"]]


@pytest.mark.usefixtures("place")
@pytest.mark.long
def test_runs_share_one_budget_and_one_that_is_too_small_ends_cleanly() -> None:
    first = local("run")
    assert (first.returncode, first.stderr) == (0, "")
    assert "12 local steps a round\nround 1/3  2 trained" in first.stdout
    assert "completed 3 of 3 rounds" in first.stdout
    report = first.stdout.splitlines()[-1].removeprefix("report: ")
    assert Path(report).resolve() == Path("runs/latest/report.html").resolve()
    assert last_summary()["rounds_completed"] == 3
    after_first = spent()

    second = local("run", "ROUNDS=1")
    assert (second.returncode, second.stderr) == (0, "")
    after_second = spent()
    assert all(more > less > 0 for more, less in zip(after_second, after_first, strict=True))

    third = local("run", "EPSILON=0.5")
    assert (third.returncode, third.stderr) == (0, "")
    assert "ended after 0 of 3 rounds" in third.stdout
    assert "No budget is left for another round: digits-0-of-2, digits-1-of-2." in third.stdout
    assert "`make forget`" in third.stdout
    assert spent() == after_second


@pytest.mark.usefixtures("place")
@pytest.mark.long
def test_ctrl_c_and_kill_leave_no_process_and_the_next_run_goes_on() -> None:
    terms = ("ROUNDS=500", "NOISE_MULTIPLIER=20")
    for number, code, word in ((signal.SIGINT, 130, "round   2/500"), (signal.SIGKILL, -9, "goes on after round")):
        process = subprocess.Popen(
            [sys.executable, "-m", "local", "run", *terms],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = ""
        while word not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        below = descendants(process.pid)
        assert len(below) > 4  # server, SuperLink and its helpers, client, zygote
        process.send_signal(number)
        said += process.communicate(timeout=30)[0]
        assert process.returncode == code
        if number == signal.SIGINT:
            assert "\nStopped: all that was started has ended." in said
            assert not any(map(alive, below))
        eventually(lambda below=below: not any(map(alive, below)))
    for name in ("digits-0-of-2", "digits-1-of-2"):
        assert ledger.read(Path(f"state/clients/{name}/ledger.jsonl")).commits >= 2


# --- what is shown ----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def standing(spent: float, budget: float = 8.0) -> dict[str, float]:
    return {"epsilon_spent": spent, "epsilon_budget": budget, "delta": 1e-5}


def a_round(number: int, partitions: dict[str, Any], **changes: Any) -> dict[str, Any]:
    line = {
        "round": number, "started": "2999-01-01T00:00:00+00:00", "seconds": 4.12, "trained": sorted(partitions),
        "refused": {}, "failed": {}, "test_accuracy": 0.9123, "test_loss": 0.3, "partitions": partitions,
    }  # fmt: skip
    return line | changes


class Run:
    """The server's files of a run of two partitions, and what is shown of them."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream = stream
        self.directory = Path("runs/r1")
        self.directory.mkdir(parents=True)
        Path("state/server").mkdir(parents=True)
        self.status("old")
        self.progress = Progress(stream, *apply())

    def status(self, run: str, *connected: str) -> None:
        status = {"run": run, "round": 1, "rounds": 12, "connected": connected, "exhausted": []}
        history.write_status(Path("state/server"), status)

    def write(self, *lines: dict[str, Any]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.directory / "rounds.jsonl").write_text(text)

    def said(self) -> str:
        """What was shown since the last time."""
        self.progress.update()
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return text


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(io.StringIO())


BOTH = {"digits-0-of-2": standing(1.234), "digits-1-of-2": standing(1.234)}


def test_each_round_is_shown_once_and_an_earlier_run_not_at_all(run: Run) -> None:
    run.write(a_round(1, BOTH))
    assert run.said().splitlines() == [
        "digits: digits-0-of-2 and digits-1-of-2",
        "3 rounds of 2 clients, budget epsilon 8 at delta 1e-05 for each",
        "12 local steps a round",
    ]  # the status is that of an earlier run
    run.status("r1")
    assert run.said() == (
        "round  1/12  2 trained, accuracy 0.912, 4.1 s\n             epsilon 1.234 of 8: digits-0-of-2, digits-1-of-2\n"
    )
    assert run.said() == ""
    one = {"digits-0-of-2": standing(2.0), "digits-1-of-2": standing(1.234)}
    refusal = {"digits-1-of-2": "policy"}
    run.write(a_round(1, BOTH), a_round(2, one, trained=["digits-0-of-2"], refused=refusal, test_accuracy=None))
    assert run.said() == (
        "round  2/12  1 trained, 1 refused, accuracy none, 4.1 s\n"
        "             epsilon 1.234 of 8: digits-1-of-2; 2.000 of 8: digits-0-of-2\n"
    )


def test_a_resumed_run_says_where_it_goes_on(run: Run) -> None:
    run.said()
    run.write(*(a_round(number, BOTH, started="2020-01-01T00:00:00+00:00") for number in (1, 2)))
    run.status("r1")
    assert run.said() == "goes on after round 2 of run r1\n"


def test_a_round_that_is_done_again_after_a_crash_is_shown_again(run: Run) -> None:
    run.said()
    run.status("r1")
    run.write(a_round(1, BOTH))
    assert "accuracy 0.912" in run.said()
    run.write()
    assert run.said() == ""
    run.write(a_round(1, BOTH, test_accuracy=0.5))
    assert "accuracy 0.500" in run.said()


def test_a_terminal_sees_what_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Terminal())
    assert "starting the server and the clients, 0 s" in run.said()
    run.status("r1", "digits-0-of-2")
    assert "waiting for clients, 1 of 2 clients connected" in run.said()
    run.status("r1", "digits-0-of-2", "digits-1-of-2")
    assert "training round 1 of 12, 2 of 2 clients connected" in run.said()


@pytest.mark.parametrize("spent", [0.0, 7.9])
def test_the_end_names_the_report_and_the_way_out_of_a_spent_budget(run: Run, spent: float) -> None:
    run.said()
    run.status("r1")
    rows = [
        {"partition": name, **standing(spent), "rounds_trained": 2, "refusals": 1, "exhausted": name == "b-2"}
        for name in ("b-10", "b-2")
    ]
    rows.append(rows[0] | {"partition": "c", "epsilon_spent": None, "epsilon_budget": None, "delta": None})
    summary = {"reason": "exhausted", "rounds_completed": 2, "seconds": 9.87, "partitions": rows}
    (run.directory / "summary.json").write_text(json.dumps(summary))
    run.progress.finish()
    text = run.said()
    table = [line.split() for line in text.splitlines() if line.startswith(("b-", "c "))]
    assert table == [
        ["b-2", f"{spent:.3f}", "8", "1e-05", "2", "1"],
        ["b-10", f"{spent:.3f}", "8", "1e-05", "2", "1"],
        ["c", "unknown", "unknown", "unknown", "2", "1"],
    ]
    assert "ended after 2 of 3 rounds, 9.9 s: nobody has budget left for another" in text
    assert "report: runs/r1/report.html" in text
    why = "No budget is left for another round" if spent else "The budget is too small for one round"
    assert f"{why}: b-2." in text
    assert "make forget" in text


def test_many_partitions_stay_readable() -> None:
    ten = {f"digits-{i}-of-10": standing(1.0 if i % 3 else 2.0) for i in range(10)}
    assert display.epsilon_text(ten) == "1.000 of 8: 1-2, 4-5, 7-8; 2.000 of 8: 0, 3, 6, 9"
    many = {f"digits-{i}-of-300": standing(i / 100) for i in range(300)}
    assert display.epsilon_text(many) == "0.000 to 2.990 of 8, median 1.495 of 300 partitions"
    named = {name: standing(1.0) for name in ("lyon", "oslo", "rome", "york")}
    assert display.epsilon_text(named) == "1.000 of 8: lyon, oslo, rome, york"
    sixty = {f"digits-{i}-of-60": standing(i) for i in range(60)}
    text = display.round_text(a_round(3, sixty), 20, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{i}.000 of 8: {i}" in " ".join(text.split()) for i in range(60))
