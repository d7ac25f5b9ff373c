"""What benchmarks' results become: README's tables and the pictures are made from them and are up to date."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import example_recipe, plots, report, tables, time_to_accuracy
from benchmarks.__main__ import NAMES
from benchmarks.bars import Bar, Bars
from client.accounting import Release, compose, epsilon
from common.tasks import load_task

SVG = "{http://www.w3.org/2000/svg}"
MEASURED = [name for name in NAMES if report.read(name) is not None]


def document(name: str, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    machine = {"cpu": "abacus", "cores": 2, "memory_gb": 1.5, "cores_used_by_others": 0.5, "busy": True}
    head = {"date": "2026-01-02 03:04 UTC", "machine": machine, "versions": {"python": "3.11.7"}}
    return {"benchmark": name, **head, "measures": "median_s: seconds", "rows": rows, "findings": ["one"], **changes}


def row(case: str, variant: str, median_s: float, ratio: float | None = None, **more: float) -> dict[str, Any]:
    return report.Row(case=case, variant=variant, median_s=median_s, runs=5, ratio=ratio, more=more).columns()


def write(folder: Path, *documents: dict[str, Any]) -> Path:
    for each in documents:
        (folder / f"{each['benchmark']}.json").write_text(json.dumps(each))
    return folder


def test_the_readme_says_what_the_results_say() -> None:
    _, between, _ = tables.split(tables.README.read_text())
    assert between == tables.section(NAMES), "make it again: make bench BENCH=tables"


@pytest.mark.parametrize("name", sorted(plots.VIEWS.keys() & set(MEASURED)))
def test_the_pictures_show_what_the_results_say(name: str) -> None:
    found = report.read(name)
    assert found is not None
    picture = (report.RESULTS / f"{name}.svg").read_text()
    assert picture == plots.draw(found), "make it again: make bench BENCH=tables"
    bars = list(ElementTree.fromstring(picture).iter(f"{SVG}rect"))  # noqa: S314 (our own)
    assert len(bars) == len(found["rows"])


def test_another_figure_is_another_section(tmp_path: Path) -> None:
    """The negative control of both."""
    first = tables.section(["step"], write(tmp_path, document("step", [row("a", "b", 1.0, 1.0)])))
    second = tables.section(["step"], write(tmp_path, document("step", [row("a", "b", 1.1, 1.0)])))
    assert first != second
    assert plots.draw(document("step", [row("a", "b", 1.0, 2.0)])) != plots.draw(
        document("step", [row("a", "b", 1.0, 3.0)])
    )


def test_each_figure_is_in_the_section(tmp_path: Path) -> None:
    """Of the files as they are: the tables leave out only what is for programs."""
    for name in MEASURED:
        found = report.read(name)
        assert found is not None
        text = tables.section([name])
        assert all(each["case"] in text and each["variant"] in text for each in found["rows"])
        assert found["date"] in text
        for each in found["rows"]:
            assert tables.seconds(each["median_s"]) in text
    assert tables.section(NAMES, tmp_path) == ""  # nothing was measured


def test_ratios_alone_are_a_table_of_cases_by_variants() -> None:
    rows = [row(case, variant, 0.25, 2.0) for case in ("small", "large") for variant in ("plain", "ours")]
    assert tables.table(rows) == [
        "| ratio (median) | plain | ours | runs |",
        "| --- | --- | --- | --- |",
        "| small | 2.00 (250 ms) | 2.00 (250 ms) | 5 |",
        "| large | 2.00 (250 ms) | 2.00 (250 ms) | 5 |",
    ]
    assert tables.table(rows[:-1])[-1] == "| large | 2.00 (250 ms) | - | 5 |"
    assert len(tables.table([*rows, rows[0]])) == 2 + 5  # twice the same: a line for each


def test_further_columns_are_shown_where_somebody_reads_them() -> None:
    first = row("10", "ours", 1234.5, idle_mb=12.34, idle_ratio=0.5, max_s=9.0, bytes=12345)
    rows = [first, row("20", "ours", 0.00123)]
    assert tables.table(rows) == [
        "| case | variant | median | runs | idle, MB | bytes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 10 | ours | 1234 s | 5 | 12.3 | 12,345 |",
        "| 20 | ours | 1.23 ms | 5 | - | - |",
    ]


@pytest.mark.parametrize(("logarithmic", "ends"), [(True, [160, 425, 690]), (False, [165.3, 213, 690])])
def test_a_bar_is_as_long_as_its_value(logarithmic: bool, ends: list[float]) -> None:
    bars = [Bar(label=str(value), value=value) for value in (1.0, 10.0, 100.0)]
    picture = Bars(title="t", groups={"g": bars}, logarithmic=logarithmic).document()
    found = ElementTree.fromstring(picture).iter(f"{SVG}rect")  # noqa: S314 (our own)
    assert [160 + float(bar.attrib["width"]) for bar in found] == pytest.approx(ends, abs=0.06)


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("value", [1.0, 0.3, 1e-9])
def test_one_bar_alone_can_be_drawn(value: float, logarithmic: bool) -> None:
    Bars(title="t", groups={"g": [Bar(label="b", value=value)]}, logarithmic=logarithmic).document()


def test_machine_and_versions_stand_where_they_change(tmp_path: Path) -> None:
    rows = [row("a", "b", 1.0)]
    changed = document("fleet", rows, versions={"python": "3.12.1"})
    results = write(tmp_path, document("step", rows), document("message", rows), changed)
    text = re.sub(r"\s+", " ", tables.section(["step", "message", "gpu", "fleet"], results))
    assert [text.count(words) for words in ("python 3.11.7", "same machine", "python 3.12.1")] == [1, 1, 1]
    assert text.count("the machine was busy: other programs used 0.5 cores") == 3


def test_only_what_is_between_the_marks_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.update([], readme)
    assert readme.read_text() == f"before\n{tables.BEGIN}\n{tables.END}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        tables.update([], readme)


@pytest.mark.parametrize("records", [718, 30_000])
def test_the_examples_budget_is_of_the_batches_that_opacus_draws(records: int) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(records, 1)), batch_size=example_recipe.BATCH)
    drawn = DPDataLoader.from_data_loader(loader)
    expected = Release(noise_multiplier=1.0, sample_rate=drawn.sample_rate, steps=3 * len(drawn))
    assert example_recipe.release(records, rounds=3) == expected


@pytest.mark.parametrize("case", time_to_accuracy.CASES, ids=lambda case: case.task)
def test_both_have_the_same_records_and_the_same_budget(case: time_to_accuracy.Case, tmp_path: Path) -> None:
    assert case.records == load_task(case.task, tmp_path).nominal_records(time_to_accuracy.CLIENTS)
    ours = case.privacy()
    example = example_recipe.release(case.records, case.example_rounds)
    steps = case.rounds * case.steps
    spent = Release(noise_multiplier=ours.noise_multiplier, sample_rate=ours.sample_rate, steps=steps)
    (we, they) = (epsilon("fixed", compose([each]), ours.delta) for each in (spent, example))
    assert 0.99 * they < we <= they == ours.epsilon


def test_an_accuracy_is_reached_in_the_first_round_that_has_it() -> None:
    course = time_to_accuracy.Course(points=[(1.0, 0.2), (2.0, 0.5), (3.0, 0.4), (4.0, 0.6)], epsilon=1.0)
    assert course.reached(0.4) == (2.0, 2.0)
    assert course.reached(0.7) == (float("inf"), float("inf"))
