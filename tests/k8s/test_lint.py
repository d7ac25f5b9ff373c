"""The linters' opinion: none of them needs a control plane, so they also stand where none can be had."""

from pathlib import Path

import pytest
import yaml

from common import pki
from k8s import render
from k8s.clients import fleet
from k8s.template import OVERLAYS, ROOT, Manifest
from tests.k8s.combinations import component_sets, everything, overlay_with
from tests.k8s.linters import findings

HERE = Path(__file__).parent
CUSTOM = ("Certificate", "Issuer", "PodMonitor", "PrometheusRule")  # no schemas of Kubernetes' own

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every overlay, and each component once, as files."""
    folder = tmp_path_factory.mktemp("rendered")
    pki.create(folder / "pki", partitions=["client-000"])
    most = max(component_sets(), key=len)
    sharing = [("gpu", "mps"), ("gpu", "mig"), ("gpu",), (*most[:2], "monitoring/operator"), most]
    overlays = [OVERLAYS / "local", OVERLAYS / "gpu-cluster", *(overlay_with(each, folder) for each in sharing)]
    files = []
    for overlay in overlays:
        files.append(folder / f"{overlay.name}.yaml")
        files[-1].write_text(render.dump(everything(overlay, fleet("1", overlay), folder / "pki")))
    return files


def test_yamllint(tmp_path: Path) -> None:
    assert findings("yamllint", "--strict", "--config-file", HERE / "yamllint.yaml", "k8s") == ""
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: 1\na: 2\n")
    assert "duplication of key" in findings("yamllint", "--config-file", HERE / "yamllint.yaml", bad)


def test_checkov(rendered: list[Path]) -> None:
    files = [argument for path in rendered for argument in ("--file", str(path))]
    assert findings("checkov", "--config-file", HERE / "checkov.yaml", *files) == ""


def test_checkov_finds_what_is_wrong(rendered: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(rendered[0].read_text().replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"))
    assert "CKV_K8S_22" in findings("checkov", "--config-file", HERE / "checkov.yaml", "--file", bad)


def test_kubernetes_validate_strict(rendered: list[Path], tmp_path: Path) -> None:
    for path in rendered:
        known = [each for each in documents(path) if each["kind"] not in CUSTOM]
        file = tmp_path / path.name
        file.write_text(render.dump(known))
        assert findings("kubernetes-validate", "--strict", file) == "", path
    known[-1]["spec"]["replicaz"] = 1
    file.write_text(render.dump(known))
    assert "replicaz" in findings("kubernetes-validate", "--strict", file)


def documents(path: Path) -> list[Manifest]:
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def test_every_finding_that_is_not_followed_has_its_reason() -> None:
    lines = (HERE / "checkov.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("- CKV"):
            assert lines[number - 1].strip().startswith("#"), line


def test_the_sources_are_small() -> None:
    """One object, or one pair, a file; and no kustomization that does more than name its parts."""
    for path in (ROOT / "k8s").rglob("*.yaml"):
        if path.name != "rendered.yaml":
            assert len(path.read_text().splitlines()) <= 130, path
