"""The report of a run: well-formed, complete, self-contained, and deaf to what a hostile name says."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Set as AbstractSet
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from common import charts
from common.certificates import new_key
from common.messages import Reason, Standing
from server import report
from tests.statements import signed

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """The rows of each table by caption, and all text; fails on tags that do not close in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "caption":
            self.caption = ""
        if tag == "tr":
            self.tables.setdefault(self.caption, []).append([])
        if tag in ("td", "th"):
            assert tag == "td" or ("scope", "col") in attrs or ("scope", "row") in attrs
            self.tables[self.caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "caption" in self.open:
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self.tables[self.caption][-1][-1] += data

    def table(self, start: str) -> list[list[str]]:
        (rows,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return rows[1:]


def standing(spent: float | None, budget: float = 8.0) -> dict[str, object]:
    return {"epsilon_spent": spent, "epsilon_budget": budget, "delta": 1e-5, "rounds_remaining": 3}


def a_round(number: int, partitions: dict[str, dict[str, object]], **changes: object) -> dict[str, object]:
    line: dict[str, object] = {
        "round": number, "started": "2026-01-01T00:00:00.123+00:00", "seconds": 4.1,
        "trained": list(partitions), "refused": {}, "failed": {},
        "test_accuracy": 0.5 + number / 100, "test_loss": 0.3, "partitions": partitions,
    }  # fmt: skip
    return line | changes


def a_row(partition: str, spent: float | None = 1.25, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "partition": partition, "epsilon_spent": spent, "epsilon_budget": 8.0, "delta": 1e-5,
        "rounds_trained": 2, "refusals": 0, "exhausted": False,
    }  # fmt: skip
    return row | changes


@pytest.fixture
def written(tmp_path: Path):
    def _written(
        rounds: list[dict[str, object]],
        rows: list[dict[str, object]],
        more: AbstractSet[str] = frozenset(),
        **changes: object,
    ) -> str:
        summary = {
            "run": "r1", "task": "digits", "strategy": "fedavg", "reason": "completed", "seconds": 12.25,
            "rounds_completed": len(rounds), "test_accuracy": 0.91, "partitions": rows,
        }  # fmt: skip
        (tmp_path / "summary.json").write_text(json.dumps(summary | changes))
        (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
        page = report.write(tmp_path)
        assert page == tmp_path / "report.html"
        assert {path.name for path in tmp_path.iterdir()} == {"report.html", "rounds.jsonl", "summary.json"} | more
        return page.read_text(encoding="utf-8")

    return _written


def svgs(markup: str) -> dict[str, ElementTree.Element]:
    texts = re.findall(r"<svg.*?</svg>", markup, flags=re.DOTALL)
    found = [ElementTree.fromstring(text) for text in texts]  # noqa: S314  our own output
    return {element.findtext(f"{SVG}title", ""): element for element in found}


def classes(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in svg.iter() if name in element.get("class", "").split()]


def test_every_figure_of_the_run_is_on_the_page(written) -> None:
    rounds = [
        a_round(1, {"a": standing(0.5), "b": standing(0.75)}),
        a_round(2, {"a": standing(1.25)}, failed={"b": "no reply within 600 s"}),
        a_round(3, {"b": standing(0.75)}, trained=[], refused={"b": "budget_exhausted"}, test_accuracy=None),
    ]
    rows = [a_row("a"), a_row("b", 0.75, rounds_trained=1, refusals=1, exhausted=True)]
    page = Page(markup := written(rounds, rows, reason="exhausted"))

    assert page.table("Where each budget stood") == [
        ["a", "1.250", "8", "1e-05", "2", "0", "no"],
        ["b", "0.750", "8", "1e-05", "1", "1", "yes"],
    ]
    assert page.table("Who did not train") == [
        ["b", "failed: no reply within 600 s", "2"],
        ["b", f"refused: budget_exhausted; {report.REASONS['budget_exhausted']}", "3"],
    ]
    assert page.table("What happened")[1:] == [
        ["2", "2026-01-01 00:00:00", "4.1", "1", "0", "1", "0.520", "0.300"],
        ["3", "2026-01-01 00:00:00", "4.1", "0", "1", "0", "unknown", "0.300"],
    ]
    for fact in ("digits, run r1", "0.910", "1.250 of 8 at delta 1e-05", "fedavg", "12.2", "ended early"):
        assert fact in page.text
    assert set(svgs(markup)) == {"Test accuracy by round", "Epsilon spent by partition and round"}


def test_a_point_stands_where_its_value_is(written) -> None:
    rounds = [a_round(number, {"a": standing(2.0**number)}) for number in (1, 2, 3)]
    epsilon = svgs(written(rounds, [a_row("a")]))["Epsilon spent by partition and round"]
    (line,) = epsilon.iter(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    (budget,) = classes(epsilon, "limit")
    axis = float(classes(epsilon, "axis")[0].get("y1", ""))
    heights = [axis - y for _, y in points]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    assert float(budget.get("y1", "")) == points[2][1]  # all of the budget is spent
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


def test_what_is_spent_stays_spent_in_rounds_without_the_partition(written) -> None:
    rounds = [a_round(1, {"a": standing(2.0)}), a_round(2, {}), a_round(3, {})]
    epsilon = svgs(written(rounds, [a_row("a")]))["Epsilon spent by partition and round"]
    (line,) = epsilon.iter(f"{SVG}polyline")
    assert len({point.split(",")[1] for point in line.get("points", "").split()}) == 1
    assert len(line.get("points", "").split()) == 3


def test_the_privacy_statement_is_complete(written) -> None:
    text = " ".join(Page(written([], [])).text.split())
    for words in (
        "One record of a partition", "one record added or removed", "DP-SGD", "Poisson-sampled Gaussian",
        "delta", "ledger", "the clients reported", "Not covered", "takes part", "several records",
        "Side channels and timing", "noised update of each partition",
    ):  # fmt: skip
        assert words in text


def test_nothing_is_loaded_or_run(written) -> None:
    markup = written([a_round(1, {"a": standing(1.0)})], [a_row("a")])
    assert not re.search(r"<script|<link|<img|<iframe|\ssrc=|\shref=|url\(|@import|\son\w+=", markup)


def test_hostile_names_are_text(written) -> None:
    evil = "<script>alert('1')</script>\"&amp;--><b>"
    rounds = [a_round(1, {evil: standing(1.0)}, refused={evil: evil}, failed={evil: evil}, started=evil)]
    markup = written(rounds, [a_row(evil)], task=evil, run=evil, strategy=evil, reason=evil)
    assert "<script" not in markup
    assert "<b>" not in markup
    assert Page(markup).table("Where each budget stood")[0][0] == evil
    hints = [title.text for title in svgs(markup)["Epsilon spent by partition and round"].iter(f"{SVG}title")]
    assert evil in hints


def test_300_partitions_are_an_envelope_and_a_table(written) -> None:
    names = [f"digits-{i}-of-300" for i in range(300)]
    rounds = [a_round(n, {name: standing(n * (1 + i / 100)) for i, name in enumerate(names)}) for n in range(1, 21)]
    page = written(rounds, [a_row(name) for name in names])
    assert len(Page(page).table("Where each budget stood")) == 300
    epsilon = svgs(page)["Epsilon spent by partition and round"]
    assert len(classes(epsilon, "band")) == 1
    assert len(list(epsilon.iter(f"{SVG}polyline"))) == 3
    words = " ".join(epsilon.itertext())
    assert "most 79.800" in words  # 20 * (1 + 299 / 100)
    assert "median 49.900" in words  # 20 * (1 + 149.5 / 100)
    assert "least 20.000" in words
    assert len(page) < 200_000


def test_partitions_that_spend_alike_share_a_line(written) -> None:
    names = [f"p{i}" for i in range(300)]
    rounds = [a_round(n, {name: standing(n / 10) for name in names}) for n in (1, 2)]
    epsilon = svgs(written(rounds, [a_row(name) for name in names]))["Epsilon spent by partition and round"]
    assert len(list(epsilon.iter(f"{SVG}polyline"))) == 1
    assert "all 300 partitions" in " ".join(epsilon.itertext())


def test_zero_rounds(written, tmp_path: Path) -> None:
    silent = a_row("a", None, epsilon_budget=None, delta=None, rounds_trained=0)
    page = Page(written([], [silent], test_accuracy=None, reason="no client connected"))
    assert page.table("Where each budget stood") == [["a", "unknown", "unknown", "unknown", "0", "0", "no"]]
    for words in ("No round was evaluated", "No partition reported", "No round was finished"):
        assert words in page.text
    assert "no client connected" in page.text
    (tmp_path / "rounds.jsonl").unlink()
    assert report.write(tmp_path).exists()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.9])
def test_one_round_and_extreme_accuracies(written, value: float) -> None:
    markup = written([a_round(7, {"a": standing(0.0)}, test_accuracy=value)], [a_row("a", 0.0)])
    Page(markup)
    assert "nan" not in markup
    for svg in svgs(markup).values():
        for circle in svg.iter(f"{SVG}circle"):
            assert charts.LEFT < float(circle.get("cx", "")) < charts.WIDTH - charts.RIGHT
            assert charts.TOP <= float(circle.get("cy", "")) <= charts.HEIGHT - charts.BOTTOM


def test_numbers_that_are_none_are_unknown(written) -> None:
    rounds = [a_round(1, {"a": standing(1.0)}, test_accuracy=float("nan"), test_loss=float("inf"))]
    assert Page(written(rounds, [a_row("a")])).table("What happened")[0][-2:] == ["unknown", "unknown"]


def test_a_line_still_being_written_is_left_out(written, tmp_path: Path) -> None:
    written([a_round(1, {"a": standing(1.0)})], [a_row("a")])
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "sta')
    assert len(Page(report.write(tmp_path).read_text()).table("What happened")) == 1


def test_every_reason_has_words() -> None:
    assert set(report.REASONS) == {str(reason) for reason in Reason}


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([1, 2, 3, 7], "1-3, 7"), ([1, 3, 4], "1, 3-4")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert report.ranges(numbers) == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 8.4, [0, 2, 4, 6, 8]), (0.58, 0.92, [0.6, 0.7, 0.8, 0.9]), (0, 0.05, None)],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float] | None) -> None:
    found = charts.ticks(low, high)
    assert expected is None or found == expected
    assert 2 <= len(found) <= 8
    assert all(low <= tick <= high for tick in found)


def test_names_at_line_ends_keep_their_order_and_distance() -> None:
    places = charts.spread([10.0, 10.5, 11.0, 50.0], gap=14, low=16, high=250)
    assert places == sorted(places)
    assert all(b - a >= 14 - 1e-9 for a, b in pairwise(places))
    assert places[0] >= 16
    assert places[-1] <= 250


def test_what_was_signed_is_shown_and_escaped(tmp_path: Path, written) -> None:
    said = Standing(
        partition="a", epsilon_spent=1.25, epsilon_budget=8.0, delta=1e-5, rounds_remaining=3,
        ledger_sequence=12, ledger_head="c" * 64,
    )  # fmt: skip
    evil = "<script>alert(1)</script>"
    audit = {"ok": True, "epsilon_lower_bound": 0.5, "time": evil}
    statements = [
        signed(new_key(), said, run="r1", update=None).content(),
        signed(new_key(), said, run="r1", update=None, partition="b", audit=audit, not_covered=(evil,)).content(),
    ]
    rounds = [a_round(1, {"a": standing(1.25)})]
    assert "no file of statements" in written(rounds, [a_row("a")])
    (tmp_path / "privacy.json").write_text(json.dumps({"statements": statements, "without_statement": ["c"]}))
    markup = written(rounds, [a_row("a")], more={"privacy.json"})
    page = Page(markup)
    assert "<script" not in markup
    first, second = page.table("What each partition has stated")
    assert first[:2] == ["a", "1.250 of 8 at delta 1e-05"]
    assert first[-1].startswith("SHA256:")
    assert second[-2].startswith("passed, epsilon at least 0.50, <script>")
    assert evil in page.text
    assert "Without a statement in this run: c." in page.text
    (tmp_path / "privacy.json").write_text(json.dumps({"statements": [], "without_statement": []}))
    assert "No partition was asked in this run." in written(rounds, [a_row("a")], more={"privacy.json"})
