"""What the pages say is there: their links, the cases of the attacks, the commands, and the numbers."""

import doctest
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRIVACY = ROOT / "docs/privacy.md"


def links(text: str) -> Iterator[str]:
    """Where the links of a page lead, but for those into the web."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            yield target


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def leads_somewhere(page: Path, text: str, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve()
    if path and not file.exists():
        return False
    return not anchor or anchor in anchors(file.read_text() if path else text)


def broken(page: Path, text: str) -> list[str]:
    """The links that lead nowhere."""
    return [target for target in links(text) if not leads_somewhere(page, text, target)]


def commands(text: str) -> set[tuple[str, ...]]:
    """`make VERB` and `python -m MODULE [VERB]` in the code of a page, blocks and spans."""
    found = set()
    for code in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", text, flags=re.DOTALL):
        for line in "".join(code).splitlines():
            for match in re.finditer(r"\bmake ([a-z][a-z0-9-]*)|python -m ([\w.]+)((?: [a-z|]+)*)", line):
                if match[1]:
                    found.add(("make", match[1]))
                else:
                    verbs = shlex.split(match[3])[:1]
                    found |= {("python", match[2], *([verb] if verb else [])) for verb in "|".join(verbs).split("|")}
    return found


def quoted() -> list[tuple[str, ...]]:
    return sorted({command for page in PAGES for command in commands(page.read_text())})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, page.read_text()) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = "# A title\n[a](privacy.md) [b](none.md) [c](#a-title) [d](#another) [e](https://a.org) [f](privacy.md#no)"
    assert broken(PRIVACY.with_name("page.md"), text) == ["none.md", "#another", "privacy.md#no"]


def test_each_case_has_its_row_and_its_test() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", PRIVACY.read_text(), flags=re.MULTILINE)
    assert [int(case) for case, _ in rows] == list(range(1, 26))
    for case, tests in rows:
        (first, *_) = links(tests)
        assert f"/test_{int(case):02}_" in first
        assert "def test_" in (PRIVACY.parent / first).read_text()


def test_commands_are_seen() -> None:
    text = "`make run` `remake it`\n```sh\nmake plan EPSILON=3\n.venv/bin/python -m client.ledger show|verify X\n```\n"
    assert commands(text) == {
        ("make", "run"), ("make", "plan"), ("python", "client.ledger", "show"), ("python", "client.ledger", "verify"),
    }  # fmt: skip


@pytest.mark.parametrize("command", quoted(), ids=" ".join)
def test_quoted_commands_exist(command: tuple[str, ...]) -> None:
    program, name, *verbs = command
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    done = subprocess.run([sys.executable, "-m", name, *verbs, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_numbers_are_what_the_lines_beside_them_give() -> None:
    failed, tried = doctest.testfile(str(PRIVACY), module_relative=False)
    assert (failed, tried >= 6) == (0, True)
