"""The one file that must survive: whole at any moment, never silently started anew, resumed by what defines a run."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import Federation, parse
from common.messages import Standing
from server.checkpoint import Anchor, Checkpoint, Member, define, finished, resume
from server.history import History, rounds
from server.outcome import UnusableError
from tests.federation import wait_for

FILE = "checkpoint.safetensors"


def config(folder: Path, **changes: Any) -> Federation:
    content = {"steps_per_round": 1, "learning_rate": 1.0, "server": {"state": str(folder)}}
    return parse(Federation, content | changes, source="test")


def arrays(value: float = 0.0) -> dict[str, Any]:
    return {"layer.weight": np.full((300, 20), value, np.float32), "scale": np.full((), value, np.float32)}


def make(settings: Federation, **changes: Any) -> Checkpoint:
    content = {
        "run": "20260101T000000Z-abcdef",
        "digest": define(settings),
        "arrays": arrays(2.0),
        "moments": {"m": arrays(3.0), "v": arrays(4.0)},
        "round": 2,
        "members": {"a": Member(rounds_trained=2, standing={"epsilon_spent": 1.0})},
        "anchors": {"a": Anchor(sequence=6, head="six"), "of-old": Anchor(sequence=9, head="nine")},
    }
    return Checkpoint(**(content | changes))


def test_what_is_saved_is_what_is_resumed(tmp_path: Path) -> None:
    settings = config(tmp_path)
    saved = make(settings)
    saved.save(tmp_path)
    found = resume(settings, arrays())
    for name in ("run", "digest", "round", "seconds", "finished", "members", "anchors"):
        assert getattr(found, name) == getattr(saved, name)
    pairs = [(found.arrays, saved.arrays), *((found.moments[key], saved.moments[key]) for key in ("m", "v"))]
    for one, other in pairs:
        assert list(one) == list(other)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    "changes",
    [{"rounds": 9}, {"seed": 1}, {"task": "cifar10"}, {"strategy": "fedadam"}, {"learning_rate": 0.5},
     {"server_learning_rate": 0.5}, {"steps_per_round": 2}, {"fit_clients": 1}, {"min_clients": 3}],
)  # fmt: skip
def test_another_definition_is_another_run_with_the_same_anchors(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved = make(config(tmp_path))
    saved.save(tmp_path)
    found = resume(config(tmp_path, **changes), arrays())
    assert found.run != saved.run
    assert (found.round, found.members, found.moments) == (0, {}, {})
    assert found.anchors == saved.anchors
    np.testing.assert_array_equal(found.arrays["layer.weight"], arrays()["layer.weight"])


def test_only_the_run_that_has_ended_is_finished(tmp_path: Path) -> None:
    """What keeps a server that stays from running the same configuration twice."""
    settings = config(tmp_path)
    assert not finished(settings)
    make(settings).save(tmp_path)
    assert not finished(settings)
    make(settings, finished=True).save(tmp_path)
    assert finished(settings)
    assert not finished(config(tmp_path, rounds=9))


def test_addresses_and_deadlines_do_not_define_a_run(tmp_path: Path) -> None:
    make(config(tmp_path)).save(tmp_path)
    moved = {"state": str(tmp_path), "fleet_address": "0.0.0.0:1", "control_port": 2}
    found = resume(config(tmp_path, round_deadline_seconds=1.0, data_root="elsewhere", server=moved), arrays())
    assert found.round == 2


def test_a_finished_run_is_followed_by_another(tmp_path: Path) -> None:
    settings = config(tmp_path)
    saved = make(settings, finished=True)
    saved.save(tmp_path)
    found = resume(settings, arrays())
    assert found.run != saved.run
    assert found.anchors == saved.anchors


@pytest.mark.parametrize("keep", [0, 7, 8, 9, 500, -1])
def test_a_torn_checkpoint_is_one_clear_line_and_stays_as_it_is(tmp_path: Path, keep: int) -> None:
    settings = config(tmp_path)
    make(settings).save(tmp_path)
    torn = (tmp_path / FILE).read_bytes()[:keep]
    (tmp_path / FILE).write_bytes(torn)
    with pytest.raises(UnusableError, match=rf"server.state: .*{FILE} cannot be read: .*restore it") as error:
        resume(settings, arrays())
    assert "\n" not in str(error.value)
    assert (tmp_path / FILE).read_bytes() == torn


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    (tmp_path / FILE).write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")  # a valid file without our facts
    with pytest.raises(UnusableError, match="cannot be read"):
        resume(settings, arrays())


def test_a_model_that_changed_its_shape_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    make(settings).save(tmp_path)
    with pytest.raises(UnusableError, match="holds round 2 of another model than task 'digits' makes now"):
        resume(settings, arrays() | {"scale": np.zeros(2, np.float32)})


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    settings, latest = config(tmp_path), -1
    state = make(settings)
    state.save(tmp_path)
    for _ in range(15):
        before = (tmp_path / FILE).stat().st_ino
        child = os.fork()
        if child == 0:
            while True:
                state.round += 1
                state.arrays = arrays(state.round)
                state.save(tmp_path)
        wait_for(lambda before=before: (tmp_path / FILE).stat().st_ino != before, "the child's first save")
        time.sleep(random.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = resume(settings, arrays())
        assert state.round > latest  # it was killed in the middle of saving, not before
        latest = state.round
        np.testing.assert_array_equal(state.arrays["layer.weight"], arrays(state.round)["layer.weight"])


def test_an_anchor_never_goes_backwards(tmp_path: Path) -> None:
    state = make(config(tmp_path))
    for sequence, head in ((8, "eight"), (7, "seven"), (8, "another eight")):
        state.note(
            Standing(
                partition="a", epsilon_spent=1.0, epsilon_budget=3.0, delta=1e-5, rounds_remaining=1,
                ledger_sequence=sequence, ledger_head=head,
            )
        )  # fmt: skip
    assert state.anchor("a") == Anchor(sequence=8, head="eight")


def test_history_drops_what_never_reached_the_checkpoint(tmp_path: Path) -> None:
    history = History(tmp_path, "one", round=0)
    for number in (1, 2, 3):
        history.append({"round": number})
    with (tmp_path / "one/rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "tra')
    assert [line["round"] for line in rounds(tmp_path / "one")] == [1, 2, 3]
    again = History(tmp_path, "one", round=2)
    again.append({"round": 3, "again": True})
    assert rounds(tmp_path / "one") == [{"round": 1}, {"round": 2}, {"round": 3, "again": True}]
    History(tmp_path, "two", round=0)
    assert (tmp_path / "latest").readlink() == Path("two")
