"""Planning against dp-accounting, used on its own: noise that fits, rounds that fit; nonsense is one line."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
from dp_accounting import (
    GaussianDpEvent,
    LowerEndpointAndGuess,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    calibrate_dp_mechanism,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from client.accounting import Mode, compose, epsilon, rounds_within
from local.errors import LocalError
from local.parameters import read_as
from local.plan import MODES, Plan, Wishes, plan, terms
from local.plan_view import chart

ROOT = Path(__file__).parent.parent
ACCOUNTANTS = {"fixed": PLDAccountant, "adaptive": RdpAccountant}
SVG = "{http://www.w3.org/2000/svg}"


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m local plan` in a directory that has the repository's configuration and nothing else."""
    (folder / "config").symlink_to(ROOT / "config")
    return subprocess.run(
        [sys.executable, "-m", "local", "plan", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def event(noise_multiplier: float, rate: float, steps: int) -> SelfComposedDpEvent:
    return SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)), steps)


@pytest.fixture(scope="module")
def small() -> Plan:
    wishes = ["EPSILON=3", "ROUNDS=4", "STEPS=5", "BATCH_SIZE=64", "RECORDS=1000", "NOISE_MULTIPLIER=1.1"]
    return plan(terms(read_as(Wishes, wishes), ROOT / "config"))


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_the_noise_is_dp_accountings(small: Plan, mode: Mode) -> None:
    (row,) = [row for row in small.noise if row.rounds == 4]
    assert row.multiplier[mode] == pytest.approx(calibrated(mode, rate=0.064), rel=0.01)


def test_half_the_rate_would_be_another_noise(small: Plan) -> None:
    """The negative control."""
    (row,) = [row for row in small.noise if row.rounds == 4]
    assert row.multiplier["adaptive"] != pytest.approx(calibrated("adaptive", rate=0.032), rel=0.05)


def calibrated(mode: Mode, *, rate: float) -> float:
    """The noise multiplier for 20 steps within epsilon 3, by dp-accounting's own search."""
    bracket = LowerEndpointAndGuess(0.5, 1.0)
    return calibrate_dp_mechanism(ACCOUNTANTS[mode], lambda noise: event(noise, rate, 20), 3.0, 1e-5, bracket, tol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_no_row_exceeds_the_budget_by_the_ledgers_account(small: Plan, mode: Mode) -> None:
    asked = small.terms

    def cost(noise: float, rounds: int) -> float:
        return epsilon(mode, compose([asked.release(noise, rounds)]), asked.privacy.delta)

    for row in small.noise:
        assert row.epsilon[mode] == cost(row.multiplier[mode], row.rounds) <= 3.0
        assert cost(row.multiplier[mode] - 0.001, row.rounds) > 3.0
    for bought in small.rounds:
        rounds = bought.rounds[mode]
        assert rounds == 0 or cost(bought.multiplier, rounds) <= 3.0
        assert cost(bought.multiplier, rounds + 1) > 3.0


def test_both_directions_agree_and_are_ordered(small: Plan) -> None:
    for mode in MODES:
        for row in small.noise:
            round_ = small.terms.release(row.multiplier[mode], 1)
            assert rounds_within(3.0, mode, frozenset(), round_, 1e-5) >= row.rounds
        assert all(a.multiplier[mode] < b.multiplier[mode] for a, b in pairwise(small.noise))
        assert all(a.rounds[mode] <= b.rounds[mode] for a, b in pairwise(small.rounds))
    assert all(row.multiplier["fixed"] < row.multiplier["adaptive"] for row in small.noise)


def test_the_chart_shows_a_line_for_each_mode(small: Plan) -> None:
    root = ElementTree.fromstring(chart(small).document())  # noqa: S314 (our own)
    lines = [line.get("points", "").split() for line in root.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [len(small.noise)] * 2
    assert "--paper" in "".join(style.text or "" for style in root.iter(f"{SVG}style"))


@pytest.mark.long
def test_the_command_prints_the_steps_that_each_mode_buys(tmp_path: Path) -> None:
    """Epsilon 8, sigma 1, rate 0.0512: `fixed` at least 15% more; each within 1% of dp-accounting's own figure."""
    ended = command(
        "EPSILON=8", "DELTA=1e-5", "NOISE_MULTIPLIER=1", "BATCH_SIZE=512", "RECORDS=10000", "STEPS=1", "ROUNDS=400",
        folder=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (found,) = re.findall(r"^> +1 +(\d+) +(\d+)$", ended.stdout, re.MULTILINE)
    steps = dict(zip(MODES, map(int, found), strict=True))
    assert steps["fixed"] >= 1.15 * steps["adaptive"]
    for mode, count in steps.items():
        accountant = ACCOUNTANTS[mode]
        assert accountant().compose(event(1.0, 0.0512, count)).get_epsilon(1e-5) <= 8.0 * 1.01
        more, less = round(count * 1.01) + 1, round(count * 0.99) - 1
        assert accountant().compose(event(1.0, 0.0512, more)).get_epsilon(1e-5) > 8.0
        assert accountant().compose(event(1.0, 0.0512, less)).get_epsilon(1e-5) < 8.0
    ElementTree.parse(tmp_path / "runs" / "plan.svg")  # noqa: S314 (our own)
    assert {path.name for path in tmp_path.iterdir()} == {"config", "runs"}  # no state, no lock


def test_defaults_are_the_files_and_another_batch_is_another_epoch() -> None:
    asked = terms(Wishes(), ROOT / "config")
    assert (asked.rounds, asked.steps, asked.privacy.epsilon, asked.privacy.records) == (3, 12, 8.0, 718)
    assert terms(Wishes(batch_size=64, records=1000), ROOT / "config").steps == 16
    assert terms(Wishes(batch_size=64, records=1000, steps=7), ROOT / "config").steps == 7


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["EPSILON=0"], "EPSILON=0: expected a number above 0"),
        (["EPSILON=1e-9", "DELTA=1e-15", "BATCH_SIZE=718"], "EPSILON=1e-09: no noise multiplier up to 1e+06"),
        (["DELTA=0.01"], "DELTA=0.01: expected below 1 / RECORDS = 0.00139 (lower it)"),
        (["DELTA=much"], "DELTA=much: expected a number above 0"),
        (["BATCH_SIZE=64", "RECORDS=10"], "BATCH_SIZE=64: expected at most 10 (RECORDS"),
        (["NOISE_MULTIPLIER=0.001"], "NOISE_MULTIPLIER=0.001: expected 0.01 to 1e+06"),
        (["NOISE_MULTIPLIER=1e7"], "NOISE_MULTIPLIER=1e+07: expected 0.01 to 1e+06"),
        (["ROUNDS=100000000"], "ROUNDS=100000000: expected at most 833333 (1e+07 steps in all, 12 in a round)"),
        (["STEPS=100000000"], "STEPS=100000000: expected at most 10000000"),
        (["ROUND=5"], "ROUND=5: unknown parameter 'ROUND' (did you mean ROUNDS?)"),
        (["LR=5"], "LR=5: unknown parameter 'LR' (expected one of EPSILON, DELTA"),
    ],
)
def test_a_wrong_wish_is_one_line_that_names_it(arguments: list[str], line: str) -> None:
    with pytest.raises(LocalError) as error:
        plan(terms(read_as(Wishes, arguments), ROOT / "config"))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_the_command_refuses_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    ended = command("ROUNDS=none", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "ROUNDS=none: expected a whole number of at least 1, as ROUNDS=10\n"
    assert {path.name for path in tmp_path.iterdir()} == {"config"}
