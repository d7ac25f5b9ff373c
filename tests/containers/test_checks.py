"""What others learnt about Dockerfiles and compose files, as their linters say it. Every exception is explained."""

import subprocess
from pathlib import Path

import yaml

from tests.containers.stack import Stack
from tests.federation import ROOT

CHECKS = ROOT / ".venv-checks/bin"
DOCKERFILES = ("docker/Dockerfile", "tests/containers/prometheus.Dockerfile")


def check(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(CHECKS / program), *arguments], cwd=ROOT, capture_output=True, text=True)


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    ended = check("hadolint", "--config", "docker/hadolint.yaml", *DOCKERFILES)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stdout + ended.stderr
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && wget http://example.org/x | sh\n")  # the control
    assert "DL3006" in check("hadolint", "--config", "docker/hadolint.yaml", str(tmp_path / "Dockerfile")).stdout


def test_checkov_has_nothing_to_say(tmp_path: Path) -> None:
    files = [part for name in DOCKERFILES for part in ("--file", name)]
    ended = check("checkov", "--config-file", "docker/checkov.yaml", *files)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "FAILED" not in ended.stdout
    (tmp_path / "Dockerfile").write_text("FROM debian:12.5\nUSER root\n")  # the control
    ended = check("checkov", "--config-file", "docker/checkov.yaml", "--file", str(tmp_path / "Dockerfile"))
    assert ended.returncode == 1
    assert "CKV_DOCKER_8" in ended.stdout


def test_compose_reads_the_files_with_a_gpu_and_without(stack: Stack) -> None:
    without = yaml.safe_load(stack.compose("config"))
    with_gpu = yaml.safe_load(stack.compose("--file", "compose.yaml", "--file", "compose.gpu.yaml", "config"))
    assert "deploy" not in without["services"]["client"]
    devices = with_gpu["services"]["client"]["deploy"]["resources"]["reservations"]["devices"]
    assert [(device["driver"], device["capabilities"]) for device in devices] == [("nvidia", ["gpu"])]
    for services in (without["services"], with_gpu["services"]):
        for service in services.values():
            service["volumes"] = sorted(service["volumes"])  # compose itself does not keep the order
    del with_gpu["services"]["client"]["deploy"]
    assert with_gpu == without
