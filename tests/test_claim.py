"""`--claim`: of the processes that share one policy, no two ever serve the same partition, and none is lost."""

import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from client.claim import claimed
from common.config import ConfigError, Policy, load
from tests.federation import ROOT, wait_for

# Says what it serves, and serves it until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from client.claim import claimed
from common.config import ConfigError, Policy, load
try:
    with claimed(load(Policy, Path("policy.yaml"))) as policy:
        print(*[p.name for p in policy.partitions], flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(error, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    partitions = "".join(f"\n  - {{name: digits-{index}-of-4, index: {index}, of: 4}}" for index in range(4))
    text = (ROOT / "config/policy.yaml").read_text().partition("partitions:")[0]
    (tmp_path / "policy.yaml").write_text(f"{text}partitions:{partitions}\n")
    (tmp_path / "state/clients").mkdir(parents=True)
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_processes_that_start_at_once_serve_each_partition_once(folder: Path) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(start(folder)) for _ in range(6)]
        stack.callback(lambda: [process.kill() for process in processes])
        words = Counter(map(said, processes))
        refusal = "partitions: all 4 are held by other clients (start fewer, or add partitions)"
        assert words == {**{f"digits-{index}-of-4": 1 for index in range(4)}, refusal: 2}


def test_a_killed_process_frees_its_partition_and_no_other(folder: Path) -> None:
    with ExitStack() as stack:
        processes = {}
        stack.callback(lambda: [process.kill() for process in processes.values()])
        for _ in range(4):
            process = stack.enter_context(start(folder))
            processes[said(process)] = process
        processes["digits-2-of-4"].kill()
        processes["digits-2-of-4"].wait()
        heir = stack.enter_context(start(folder))
        processes["heir"] = heir
        assert said(heir) == "digits-2-of-4"


def test_without_the_ledgers_volume_nothing_is_claimed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "state")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"client\.state: state/clients: No such file"):  # noqa: SIM117
        with claimed(load(Policy, Path("policy.yaml"))):
            pass


def test_a_client_that_finds_all_held_says_so_and_ends(folder: Path) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(start(folder)) for _ in range(4)]
        stack.callback(lambda: [process.kill() for process in processes])
        for process in processes:
            said(process)
        surplus = subprocess.run(
            [sys.executable, "-m", "client", "--policy", "policy.yaml", "--claim"],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert surplus.returncode == 2
    assert surplus.stderr == "partitions: all 4 are held by other clients (start fewer, or add partitions)\n"
    assert wait_for(lambda: all(process.poll() is not None for process in processes), "the holders end")
