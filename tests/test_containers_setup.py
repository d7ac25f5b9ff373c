"""Compose's one-shot service, as a process: it runs at each `up` and must never start a budget anew."""

import hashlib
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from client import ledger
from common.config import Federation, Policy, load
from tests.federation import ROOT

VOLUMES = ("config", "clients", "grafana", "pki")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for name in VOLUMES:
        (tmp_path / "state" / name).mkdir(parents=True)
    return tmp_path


def setup(folder: Path, **parameters: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local.containers"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), **parameters},
        capture_output=True,
        text=True,
    )


def files(folder: Path) -> dict[str, str]:
    """A digest of every file in the volumes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "state").rglob("*"))
        if path.is_file()
    }


def test_a_second_up_changes_nothing_and_says_no_password(folder: Path) -> None:
    first = setup(folder, CLIENTS="2", ROUNDS="")
    assert first.returncode == 0, first.stderr
    password = (folder / "state/grafana/admin-password").read_text()
    assert len(password) >= 24
    assert first.stdout.count(password) == 1
    assert stat.S_IMODE((folder / "state/grafana/admin-password").stat().st_mode) == 0o640
    before = files(folder)
    again = setup(folder, CLIENTS="2", ROUNDS="")
    assert again.returncode == 0, again.stderr
    assert files(folder) == before
    assert password not in again.stdout


def test_programs_find_each_other_by_the_services_names(folder: Path) -> None:
    ended = setup(folder, CLIENTS="2", ROUNDS="7")
    assert ended.returncode == 0, ended.stderr
    federation = load(Federation, folder / "state/config/federation.yaml")
    policy = load(Policy, folder / "state/config/policy.yaml")
    assert federation.rounds == 7
    assert federation.server.fleet_address == "0.0.0.0:9092"
    assert federation.server.metrics_address == "0.0.0.0:9465"
    assert policy.client.server_address == "server:9092"
    assert policy.client.metrics_address == "0.0.0.0:9464"
    keys = sorted(path.stem for path in (folder / federation.server.public_keys).glob("*.pub"))
    assert keys == [partition.name for partition in policy.partitions] == ["digits-0-of-2", "digits-1-of-2"]


def test_a_partition_with_a_key_never_gets_a_new_ledger(folder: Path) -> None:
    """Whoever removes a ledger does not get the budget back: what was spent is not known any more."""
    assert setup(folder, CLIENTS="2").returncode == 0
    path = folder / "state/clients/digits-1-of-2/ledger.jsonl"
    path.unlink()
    ended = setup(folder, CLIENTS="2")
    assert ended.returncode == 2
    assert "digits-1-of-2/ledger.jsonl: missing" in ended.stderr
    assert "docker compose down --volumes" in ended.stderr
    assert not path.exists()


def test_another_number_of_clients_is_another_split_beside_the_first(folder: Path) -> None:
    assert setup(folder, CLIENTS="2").returncode == 0
    kept = ledger.read(folder / "state/clients/digits-0-of-2/ledger.jsonl").head
    ended = setup(folder, CLIENTS="3")
    assert ended.returncode == 0, ended.stderr
    assert ledger.read(folder / "state/clients/digits-0-of-2/ledger.jsonl").head == kept
    keys = {path.stem for path in (folder / "state/config/public_keys").glob("*.pub")}
    assert keys == {f"digits-{index}-of-3" for index in range(3)}


def test_a_parameter_that_is_wrong_is_named(folder: Path) -> None:
    ended = setup(folder, CLIENTS="0")
    assert ended.returncode == 2
    assert ended.stderr == "CLIENTS=0: expected a whole number of at least 1, as CLIENTS=10\n"
    assert files(folder).keys() == {"state/config/setup.lock"}
