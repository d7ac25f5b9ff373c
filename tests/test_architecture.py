"""The shape that the design promises: who may import whom, what stays light, who knows Flower's inside."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "client", "common", "local", "audit")
ARROWS = {
    "server": {"common"},
    "client": {"common"},
    "common": set(),
    "local": {"common", "server", "client"},
    "audit": {"common", "client"},
}
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
KNOWS_FLOWER = {"client/fleet.py"}
HEAVY = ("torch", "opacus", "torchvision", "flwr_datasets", "sklearn")


def modules(packages: tuple[str, ...] = PACKAGES) -> Iterator[tuple[Path, ast.Module]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    """The full name of everything that is imported, wherever in the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_are_seen_wherever_they_are() -> None:
    """The negative control of what follows."""
    source = "import a.b as c\ndef f():\n    from d.e import g, h\n    if f: import i"
    assert list(imports(ast.parse(source))) == ["a.b", "d.e.g", "d.e.h", "i"]


def test_imports_name_the_whole_module() -> None:
    """A relative one would escape the tests below."""
    relative = [
        str(path)
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


def test_dependencies_point_one_way() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules()
        for name in imports(tree)
        if (to := name.split(".")[0]) in (*PACKAGES, "tests", "benchmarks")
        and to not in {*ARROWS[path.parts[0]], path.parts[0]}
    ]
    assert wrong == []


def test_one_file_knows_flowers_private_modules() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules((*PACKAGES, "benchmarks"))
        for name in imports(tree)
        if name.split(".")[0] == "flwr"
        # `from flwr.app import X` is public, `from flwr.app.message import X` is not.
        and name.rpartition(".")[0] not in PUBLIC_FLOWER
        and str(path) not in KNOWS_FLOWER
    ]
    assert wrong == []


def test_one_file_of_the_tests_gives_a_process_flowers_identity() -> None:
    """Tests that play a server speak its protocol; the rest of Flower's inside they leave alone."""
    found = {
        str(path) for path, tree in modules(("tests",)) for name in imports(tree) if "supercore.task_identity" in name
    }
    assert found == {"tests/wire.py"}


def test_common_knows_neither_flower_servers_nor_clients_nor_opacus() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules()
        for name in imports(tree)
        if path.parts[0] == "common" and name.startswith(("opacus", "flwr.serverapp", "flwr.clientapp"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("client.ledger", (*HEAVY, "flwr", "grpc")),
        ("client.ledger.__main__", (*HEAVY, "flwr", "grpc")),
        ("client.exporter", HEAVY),
        ("client.host", HEAVY),
        ("client.__main__", (*HEAVY, "grpc", "flwr", "numpy")),  # what runs before the zygote is forked
        ("server.exporter", (*HEAVY, "flwr")),
        ("server.__main__", HEAVY),
        ("local.__main__", HEAVY),
        ("common.pki", (*HEAVY, "flwr", "grpc")),
    ],
)
def test_what_is_light_stays_light(module: str, banned: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print(*sorted(set(sys.modules) & set({banned!r})))"
    found = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True
    )
    assert found.split() == []


def test_only_programs_print() -> None:
    wrong = [
        str(path)
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if path.name not in ("__main__.py", "pki.py", "forgetting.py", "progress.py", "control.py", "records.py")
    ]
    assert wrong == []


def test_no_module_is_a_drawer() -> None:
    names = {path.name for path, _ in modules()}
    assert not names & {"utils.py", "helpers.py", "misc.py"}
    long = {str(path): len((ROOT / path).read_text().splitlines()) for path, _ in modules()}
    assert {path: lines for path, lines in long.items() if lines > 360} == {}


def test_the_readme_shows_the_tree_that_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1]
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines() if line[:1].isalpha()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    there = {name.split("/")[0] for name in tracked if not name.startswith(".")} - {"README.md", "pyproject.toml"}
    assert shown == there
