"""The federation end to end: real processes, TLS, node keys, ledgers, metrics."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.policy import worst_round
from tests.federation import ROOT, Federation, descendants, federation, metrics, wait_for


def show(run: Federation, partition: str) -> dict[str, float]:
    """What `python -m client.ledger show --json` prints."""
    output = subprocess.check_output(
        [sys.executable, "-m", "client.ledger", "show", str(run.ledger_path(partition)), "--json"], cwd=ROOT
    )
    return json.loads(output)


def finish(run: Federation) -> dict:
    """Runs to the end; the summary."""
    server = run.start_server()
    client = run.start_client()
    assert server.wait(timeout=120) == 0, run.log("server")
    client.terminate()
    assert client.wait(timeout=30) == 0, run.log("client")
    return json.loads((run.folder / "runs/latest/summary.json").read_text())


def verify(run: Federation, path: Path) -> tuple[int, str]:
    """The exit code and the words of `python -m client.statement verify` with all that there is to compare with."""
    keys, ledgers = run.folder / "state/pki/public/clients", run.folder / "state/clients"
    command = [sys.executable, "-m", "client.statement", "verify", path, "--ledger", ledgers, "--public-keys", keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def states(run: Federation, summary: dict, *, rounds: int) -> Path:
    """Asserts that each partition has signed what the ledger says, and that the page shows it; the file."""
    folder = run.folder / "runs" / summary["run"]
    path = folder / "privacy.json"
    content = json.loads(path.read_text())
    assert content["without_statement"] == []
    assert [each["statement"]["partition"] for each in content["statements"]] == run.partitions
    for each in content["statements"]:
        said, account = each["statement"], run.account(each["statement"]["partition"])
        assert (said["epsilon_spent"], said["ledger"]["hash"]) == (account.epsilon_spent, account.head)
        assert said["run"]["rounds_charged"] == said["run"]["rounds_committed"] == rounds
        assert said["run"]["name"] == summary["run"]
        assert (said["update_sha256"] is None) == (rounds == 0)
        assert said["ledger"]["hash"][:12] in (folder / "report.html").read_text()
    code, words = verify(run, path)
    assert (code, words.count("the ledger agrees")) == (0, len(run.partitions)), words
    return path


@pytest.mark.long
def test_updates_travel_packed_where_the_server_asks_for_it(tmp_path: Path) -> None:
    with federation(tmp_path, compression="int8") as run:
        summary = finish(run)
        assert summary["rounds_completed"] == 3
        assert summary["test_accuracy"] > 0.3
        states(run, summary, rounds=3)  # about the packed bytes, which the server has compared
        assert "statement is dropped" not in run.log("server")


@pytest.mark.long
def test_a_compiled_step_serves_all_workers(tmp_path: Path) -> None:
    with federation(tmp_path) as run:
        run.policy_content["training"] |= {"gradient_mode": "compiled", "max_workers": 2}
        run.configure()
        summary = finish(run)
        assert [each["rounds_trained"] for each in summary["partitions"]] == [3, 3]
        assert summary["test_accuracy"] > 0.5
        assert "the step is compiled for 8 records at a time" in run.log("client")
        assert not list(Path(tempfile.gettempdir()).glob("fedeps-*/step.so"))


@pytest.mark.long
def test_two_runs_continue_one_budget_and_a_smaller_budget_refuses(tmp_path: Path) -> None:
    with federation(tmp_path) as run:
        first = finish(run)
        kept = states(run, first, rounds=3)
        assert first["rounds_completed"] == 3
        assert first["test_accuracy"] > 0.3  # far above guessing; the noise is strong here
        spent = {p["partition"]: p["epsilon_spent"] for p in first["partitions"]}
        assert set(spent) == set(run.partitions)
        for name in run.partitions:
            account = run.account(name)
            assert spent[name] == account.epsilon_spent
            assert (len(account.messages), account.commits) == (3, 3)

        second = finish(run)
        assert second["run"] != first["run"]
        states(run, second, rounds=3)
        # The first run's statements hold against ledgers that have gone on since; an old ledger does not bear them out.
        assert verify(run, kept)[0] == 0
        path = run.ledger_path(run.partitions[0])
        now = path.read_bytes()
        path.write_bytes(b"".join(now.splitlines(keepends=True)[:-8]))
        code, said = verify(run, run.folder / "runs/latest/privacy.json")
        assert (code, said.count("DOES NOT HOLD"), "an old copy was put back" in said) == (1, 1, True)
        path.write_bytes(now)
        for row in second["partitions"]:
            assert row["epsilon_spent"] > spent[row["partition"]]
            assert run.account(row["partition"]).commits == 6

        run.policy_content["privacy"]["epsilon"] = 0.5
        run.configure()
        third = finish(run)
        assert third["reason"] == "exhausted"
        assert third["rounds_completed"] == 0
        states(run, third, rounds=0)
        for row in third["partitions"]:
            assert row["exhausted"]
            assert row["refusals"] == 1
            assert row["epsilon_budget"] == 0.5
            assert run.account(row["partition"]).commits == 6

        run.policy_content["privacy"]["epsilon"] = 9.0  # the owner may raise it again: an entry, not a new ledger
        run.configure()
        fourth = finish(run)
        assert fourth["rounds_completed"] == 3
        kinds = [json.loads(line)["kind"] for line in run.ledger_path(run.partitions[0]).read_text().splitlines()]
        assert kinds.count("budget") == 2
        assert kinds.count("create") == 1


def test_metrics_are_the_ledger_during_a_run(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=500, privacy={"noise_multiplier": 20.0}) as run:
        server = run.start_server()
        run.start_client()
        for commits in (1, 6):
            wait_for(lambda commits=commits: run.account(run.partitions[0]).commits >= commits, f"{commits} rounds")
            with paused(server.pid):  # so that no round ends between the scrape and the ledger's own word
                for name in run.partitions:
                    wait_for(lambda name=name: not run.account(name).open, "the round in flight")
                    shown, scraped = show(run, name), metrics(run.client_metrics)
                    assert shown["epsilon_spent"] > 0
                    assert scraped["fl_privacy_epsilon_spent", name] == shown["epsilon_spent"]
                    assert scraped["fl_privacy_epsilon_reserved", name] == shown["epsilon_reserved"] == 0
                    assert scraped["fl_privacy_epsilon_budget", name] == shown["epsilon_budget"]
                    assert scraped["fl_privacy_ledger_sequence", name] == shown["sequence"]
                    assert scraped["fl_privacy_ledger_ok", name] == 1
                    assert scraped["fl_client_connected", name] == 1
        assert metrics(run.server_metrics)["fl_server_round", ""] >= 6


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """The process and all it started stand still."""
    stopped = [pid, *descendants(pid)]
    for each in stopped:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in stopped:
            os.kill(each, signal.SIGCONT)


@pytest.mark.parametrize("accounting", ["fixed", "adaptive"])
def test_the_ledger_stops_the_run_at_the_budget(tmp_path: Path, accounting: str) -> None:
    terms = {"noise_multiplier": 1.5, "epsilon": 1.5, "accounting": accounting}
    with federation(tmp_path, rounds=50, privacy=terms) as run:
        summary = finish(run)
        assert summary["reason"] == "exhausted"
        assert 1 <= summary["rounds_completed"] < 50
        for name in run.partitions:
            account = run.account(name)
            assert account.mode == accounting
            assert account.epsilon_spent <= 1.5 < account.epsilon_with(worst_round(run.policy.privacy))
