"""Rounds over a grid without a network: sampling, deadlines, refusals, exhaustion, and going on after a kill."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Error

from common import messages
from common.certificates import new_key, openssh_public
from common.config import Federation, parse
from common.messages import ARRAYS, CONFIG, STANDING, STATEMENT, Proposal, Reason, Standing
from server import checkpoint
from server.app import run
from server.outcome import RunError
from tests.fake_grid import Answer, FakeGrid, Interrupted, refuses, trains
from tests.statements import signed


def config(folder: Path, **changes: Any) -> Federation:
    """Partitions a to e are registered."""
    keys = folder / "keys"
    keys.mkdir(exist_ok=True)
    for name in "abcde":
        (keys / f"{name}.pub").touch()
    state = folder / "state"
    state.mkdir(exist_ok=True)
    content = {
        "rounds": 4, "steps_per_round": 1, "learning_rate": 1.0, "min_clients": 2, "fit_clients": 2,
        "round_deadline_seconds": 20.0, "connect_deadline_seconds": 0.5,
        "server": {"public_keys": str(keys), "state": str(state), "runs": str(folder / "runs")},
    }  # fmt: skip
    return parse(Federation, content | changes, source="test")


def everyone(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, trains)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/latest/rounds.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/latest/summary.json").read_text())


def model(folder: Path) -> bytes:
    return (folder / "runs/latest/model.safetensors").read_bytes()


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
@pytest.mark.parametrize("kill_in_round", [1, 3, 4])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, strategy: str, kill_in_round: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run(config(whole, strategy=strategy), FakeGrid(everyone("a", "b", "c")))
    with pytest.raises(Interrupted):
        run(config(cut, strategy=strategy), FakeGrid(everyone("a", "b", "c"), kill_in_round=kill_in_round))
    first = (cut / "runs/latest").readlink()
    with (cut / "runs/latest/rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": kill_in_round}) + '\n{"round": ')  # its checkpoint was never written

    grid = FakeGrid(everyone("a", "b", "c"))
    run(config(cut, strategy=strategy), grid)

    assert (cut / "runs/latest").readlink() == first
    assert grid.asked[0][0] == kill_in_round
    assert model(cut) == model(whole)
    for line, other in zip(rounds(cut), rounds(whole), strict=True):
        for key in ("round", "trained", "test_accuracy", "test_loss", "partitions"):
            assert line[key] == other[key]
    assert summary(cut)["partitions"] == summary(whole)["partitions"]
    assert summary(cut)["reason"] == "completed"


def test_without_its_moments_fedadam_would_not_go_on_as_it_was(tmp_path: Path) -> None:
    """What the test above would not notice if moments made no difference."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run(config(whole, strategy="fedadam"), FakeGrid(everyone("a", "b")))
    settings = config(cut, strategy="fedadam")
    with pytest.raises(Interrupted):
        run(settings, FakeGrid(everyone("a", "b"), kill_in_round=3))
    state = checkpoint.resume(settings, safetensors.numpy.load(model(whole)))
    assert set(state.moments) == {"m", "v"}
    state.moments = {}
    state.save(settings.server.state)
    run(settings, FakeGrid(everyone("a", "b")))
    assert model(cut) != model(whole)


def test_fedavg_is_the_weighted_mean_and_parameters_stay_float32(tmp_path: Path) -> None:
    for strategy in ("fedavg", "fedadam"):
        grid, sent = FakeGrid({}), {}

        def keep(name: str, message: Any, sent: dict = sent) -> Any:
            content = trains(name, message)
            content["metrics"]["weight"] = {"a": 1.0, "b": 3.0}[name]
            sent[name] = {key: array.numpy() for key, array in content["arrays"].items()}
            return content

        grid.answers = {"a": keep, "b": keep}
        run(config(tmp_path, rounds=1, strategy=strategy), grid)
        after = safetensors.numpy.load(model(tmp_path))
        for name, array in after.items():
            assert array.dtype == np.float32
            mean = (sent["a"][name] + 3 * sent["b"][name]) / 4
            assert np.allclose(array, mean, atol=1e-6) == (strategy == "fedavg")


def test_exactly_fit_clients_are_asked_and_all_get_their_turn(tmp_path: Path) -> None:
    asked = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        grid = FakeGrid(everyone(*"abcde"))
        run(config(folder, rounds=8, min_clients=5, fit_clients=3), grid)
        asked.append(grid.asked)
        for number in range(1, 9):
            chosen = [name for round, name in grid.asked if round == number]
            assert len(chosen) == len(set(chosen)) == 3
        assert {name for _, name in grid.asked} == set("abcde")
    assert asked[0] == asked[1]  # by the seed, not by the run


def test_a_node_without_a_registered_key_is_never_asked(tmp_path: Path) -> None:
    grid = FakeGrid(everyone("a", "b", "stranger"))
    run(config(tmp_path), grid)
    assert {name for _, name in grid.asked} == {"a", "b"}


def test_a_late_reply_costs_the_round_its_deadline_and_is_never_counted(tmp_path: Path) -> None:
    grid = FakeGrid(everyone("a", "b"))
    grid.delays["b"] = 0.6
    started = time.monotonic()
    run(config(tmp_path, rounds=3, round_deadline_seconds=0.5), grid)
    assert time.monotonic() - started < 6
    for line in rounds(tmp_path):
        assert line["trained"] == ["a"]
        assert line["failed"] == {"b": "error 9001: no reply within 0.5 s"}
    assert {row["partition"]: row["rounds_trained"] for row in summary(tmp_path)["partitions"]} == {"a": 3, "b": 0}


def test_whoever_sends_rubbish_costs_the_others_one_round_at_most(tmp_path: Path) -> None:
    grid = FakeGrid(everyone("a", "b", "c"))
    grid.undecodable = {"b"}
    run(config(tmp_path, rounds=3, min_clients=3, fit_clients=3, round_deadline_seconds=0.5), grid)
    after = rounds(tmp_path)[1:]
    assert [line["trained"] for line in after] == [["a", "c"]] * 2
    assert after[0]["failed"] == {"b": "error 9002: the reply cannot be decoded"}


def few_at_once(folder: Path, count: int, **changes: Any) -> Federation:
    """A round of all five, of whose replies SuperLink may hold so many."""
    made = config(folder, min_clients=5, fit_clients=5, rounds=2, **changes)
    return made.model_copy(update={"server": made.server.model_copy(update={"reply_memory_mb": count * 2600e-6})})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_more_are_asked_at_once_than_replies_may_be_held(tmp_path: Path, count: int) -> None:
    whole, waves = tmp_path / "whole", tmp_path / "waves"
    for folder in (whole, waves):
        folder.mkdir()
    free, bounded = FakeGrid(everyone(*"abcde")), FakeGrid(everyone(*"abcde"))
    run(few_at_once(whole, 5), free)
    run(few_at_once(waves, count), bounded)
    assert free.most_held == 5
    assert bounded.most_held == count
    assert bounded.most_pulled == 1  # a sixteenth of them, and always one
    assert model(waves) == model(whole)
    assert [line["trained"] for line in rounds(waves)] == [list("abcde")] * 2


def test_less_than_one_reply_is_one(tmp_path: Path) -> None:
    grid = FakeGrid(everyone(*"abcde"))
    settings = few_at_once(tmp_path, 1)
    tiny = settings.server.model_copy(update={"reply_memory_mb": 1e-9})
    run(settings.model_copy(update={"server": tiny}), grid)
    assert grid.most_held == 1


@pytest.mark.parametrize(("seconds", "held"), [(0.0, {1, 2, 3}), (1.5, {5})])
def test_more_are_asked_while_no_replies_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, held: set[int]
) -> None:
    """Where training takes long all train at once; where it does not, SuperLink has few questions to look through."""
    monkeypatch.setattr("server.nodes._ASKED_FIRST", 1)
    monkeypatch.setattr("server.nodes._ASKED_MORE", 2)
    grid = FakeGrid(everyone(*"abcde"))
    grid.delays = dict.fromkeys("abcde", seconds)
    run(few_at_once(tmp_path, 5), grid)
    assert grid.most_held in held
    assert [line["trained"] for line in rounds(tmp_path)] == [list("abcde")] * 2


def test_whoever_hangs_keeps_one_place_and_the_others_are_asked(tmp_path: Path) -> None:
    grid = FakeGrid(everyone(*"abde") | {"c": lambda *_: None})
    run(few_at_once(tmp_path, 2, round_deadline_seconds=1.5), grid)
    for line in rounds(tmp_path):
        assert line["trained"] == list("abde")
        assert line["failed"] == {"c": "error 9001: no reply within 1.5 s"}


def test_the_deadline_is_of_the_whole_round_and_who_was_not_asked_is_told_apart(tmp_path: Path) -> None:
    grid = FakeGrid(everyone(*"abcde"))
    grid.delays = dict.fromkeys("abcde", 0.4)
    started = time.monotonic()
    run(few_at_once(tmp_path, 1, round_deadline_seconds=1.0), grid)
    assert time.monotonic() - started < 8
    for number, line in enumerate(rounds(tmp_path), 1):
        asked = {name for round, name in grid.asked if round == number}
        assert 1 <= len(line["trained"]) <= len(asked) < 5
        assert {name for name, why in line["failed"].items() if "no reply within 1 s" in why} == asked - {
            *line["trained"]
        }
        unasked = {name for name, why in line["failed"].items() if "not asked before the round's deadline" in why}
        assert unasked == set("abcde") - asked
    assert all(member["refusals"] == 0 for member in summary(tmp_path)["partitions"])


def test_a_push_over_which_superlink_stumbles_is_sent_again(tmp_path: Path) -> None:
    grid = FakeGrid(everyone("a", "b"))
    grid.stumbles = 1
    run(config(tmp_path), grid)
    assert [line["trained"] for line in rounds(tmp_path)] == [["a", "b"]] * 4
    assert len(grid.asked) == 8  # nobody twice in a round
    grid.stumbles = 2
    with pytest.raises(RuntimeError, match="500"):
        run(config(tmp_path, seed=1), grid)


def test_updates_that_are_finite_only_one_by_one_are_not_taken(tmp_path: Path) -> None:
    def huge(name: str, message: Any) -> Any:
        content = trains(name, message)
        for array in content["arrays"].values():
            array.data = array.data[:-4] + np.float32(3e38).tobytes()  # its square is beyond float32
        return content

    with pytest.raises(RunError, match="3 tries without an update: a: the updates are finite but"):
        run(config(tmp_path, strategy="fedadam"), FakeGrid({"a": huge, "b": huge}))


def test_who_has_no_budget_left_is_not_asked_again_and_the_others_go_on(tmp_path: Path) -> None:
    def last(name: str, message: Any) -> Any:
        return trains(name, message, rounds_remaining=0)

    answers = {"a": trains, "b": refuses(Reason.BUDGET, rounds_remaining=0), "c": last}
    grid = FakeGrid(answers)
    run(config(tmp_path, min_clients=3, fit_clients=3), grid)
    assert [name for _, name in grid.asked].count("b") == 1
    assert [name for _, name in grid.asked].count("c") == 1
    assert rounds(tmp_path)[0]["refused"] == {"b": "budget_exhausted"}
    rows = {row["partition"]: row for row in summary(tmp_path)["partitions"]}
    assert {name: (row["exhausted"], row["rounds_trained"], row["refusals"]) for name, row in rows.items()} == {
        "a": (False, 4, 0), "b": (True, 0, 1), "c": (True, 1, 0),
    }  # fmt: skip


def test_the_run_ends_well_when_every_budget_is_spent(tmp_path: Path) -> None:
    run(config(tmp_path), FakeGrid(dict.fromkeys("ab", refuses(Reason.BUDGET, rounds_remaining=0))))
    assert summary(tmp_path)["reason"] == "exhausted"
    assert summary(tmp_path)["rounds_completed"] == 0
    assert [row["exhausted"] for row in summary(tmp_path)["partitions"]] == [True, True]
    grid = FakeGrid(everyone("a", "b"))  # the owners raised their budgets
    run(config(tmp_path), grid)
    assert summary(tmp_path)["rounds_completed"] == 4


def test_three_tries_without_an_update_end_the_run_and_say_why(tmp_path: Path) -> None:
    answers = {"a": refuses(Reason.POLICY), "b": lambda *_: Error(3, "the worker\ndied")}
    grid = FakeGrid(answers)
    with pytest.raises(RunError, match="round 1: 3 tries without an update: a: policy; b: error 3: the worker died"):
        run(config(tmp_path), grid)
    assert len(grid.asked) == 6
    assert summary(tmp_path)["reason"].startswith("failed: round 1")
    assert {row["partition"]: row["refusals"] for row in summary(tmp_path)["partitions"]} == {"a": 3, "b": 0}


def test_too_few_clients_end_the_run_and_name_those_that_came(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"min_clients: 2 partitions did not connect .*; connected: a \("):
        run(config(tmp_path), FakeGrid(everyone("a")))


def test_a_lost_client_is_waited_for_and_then_done_without(tmp_path: Path) -> None:
    grid = FakeGrid(everyone("a", "b"))

    def leaves(name: str, message: Any) -> Any:
        del grid.answers["b"]
        return trains(name, message)

    grid.answers["b"] = leaves
    started = time.monotonic()
    run(config(tmp_path), grid)
    assert 0.4 < time.monotonic() - started < 5  # once, not in every round
    assert [line["trained"] for line in rounds(tmp_path)] == [["a", "b"], ["a"], ["a"], ["a"]]


def test_anchors_outlive_runs_and_go_with_the_next_question(tmp_path: Path) -> None:
    seen = []

    def keep(name: str, message: Any) -> Any:
        seen.append((message.content["config"]["anchor_sequence"], message.content["config"]["anchor_head"]))
        return trains(name, message)

    for seed in (0, 1):
        run(config(tmp_path, rounds=2, seed=seed), FakeGrid({"a": keep, "b": trains}))
    assert seen == [(0, ""), *((sequence, f"{sequence:064x}") for sequence in (2, 4, 6))]
    assert len({path.name for path in (tmp_path / "runs").iterdir()}) == 3  # two runs and `latest`


def test_a_ledger_that_goes_backwards_is_not_believed(tmp_path: Path) -> None:
    def replayed(name: str, message: Any) -> Any:
        return trains(name, message, ledger_sequence=2)

    run(config(tmp_path), FakeGrid({"a": trains, "b": replayed}))
    assert rounds(tmp_path)[1]["failed"] == {"b": "expected a ledger beyond 2, found 2"}
    assert summary(tmp_path)["partitions"][1]["rounds_trained"] == 1


def states(key: Any, answer: Answer = trains, **changes: Any) -> Answer:
    """The same answer with a signed statement beside it."""

    def with_statement(name: str, message: Any) -> Any:
        records = answer(name, message)
        said = Standing.from_record(records[STANDING])
        update = messages.digest(records[ARRAYS]) if ARRAYS in records else None
        run_name = Proposal.from_record(message.content[CONFIG]).run
        text = signed(key, said, run=run_name, update=update, **changes).dumps()
        records[STATEMENT] = messages.statement(text)
        return records

    return with_statement


def privacy(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/latest/privacy.json").read_text())


def test_the_newest_true_statements_end_in_the_file_and_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, keys = config(tmp_path, min_clients=4, fit_clients=4, rounds=2), {name: new_key() for name in "abcd"}
    for name, key in keys.items():
        (tmp_path / f"keys/{name}.pub").write_bytes(openssh_public(key, name))

    def rubbish(name: str, message: Any) -> Any:
        records = trains(name, message)
        records[STATEMENT] = messages.statement("{" * 500)
        return records

    answers = {"a": states(keys["a"]), "b": states(keys["a"]), "c": rubbish, "d": trains}  # b's key is not a's
    run(settings, FakeGrid(answers))
    found = privacy(tmp_path)
    assert summary(tmp_path)["rounds_completed"] == 2
    assert all(len(line["trained"]) == 4 for line in rounds(tmp_path))  # a false statement costs nobody the round
    assert found["run"] == summary(tmp_path)["run"]
    assert found["model_sha256"] == hashlib.sha256(model(tmp_path)).hexdigest()
    assert found["without_statement"] == ["b", "c", "d"]
    (only,) = found["statements"]
    assert only["statement"]["partition"] == "a"
    assert only["statement"]["epsilon_spent"] == summary(tmp_path)["partitions"][0]["epsilon_spent"]  # the newest
    for name, why in (("b", "signed by another key"), ("c", "not JSON")):
        assert f"{name}: its signed statement is dropped: {why}" in caplog.text
    page = (tmp_path / "runs/latest/report.html").read_text()
    assert "What each partition has stated and signed" in page
    assert "Without a statement in this run: b, c, d." in page
    assert "Side channels." in page


def test_statements_survive_a_crash_and_a_run_that_fails(tmp_path: Path) -> None:
    key = new_key()
    settings = config(tmp_path, min_clients=1, fit_clients=1)
    (tmp_path / "keys/a.pub").write_bytes(openssh_public(key, "a"))
    with pytest.raises(Interrupted):
        run(settings, FakeGrid({"a": states(key)}, kill_in_round=3))
    with pytest.raises(RunError):
        run(settings, FakeGrid({}))
    assert "failed" in summary(tmp_path)["reason"]
    assert [each["statement"]["partition"] for each in privacy(tmp_path)["statements"]] == ["a"]


def test_a_partition_that_only_refuses_states_what_it_has_spent(tmp_path: Path) -> None:
    key = new_key()
    settings = config(tmp_path, min_clients=1, fit_clients=1)
    (tmp_path / "keys/a.pub").write_bytes(openssh_public(key, "a"))
    spent = states(key, refuses(Reason.BUDGET, rounds_remaining=0))
    run(settings, FakeGrid({"a": spent}))
    assert summary(tmp_path)["reason"] == "exhausted"
    assert len(privacy(tmp_path)["statements"]) == 1
