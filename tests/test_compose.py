"""What compose.yaml promises, read as text: each image named in one place, nothing published to the world."""

import re
from typing import Any

import yaml

from local.parameters import NAMES
from tests.federation import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
ENV = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env").read_text(), re.M))
FULL_TAG = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*(@sha256:[0-9a-f]{64})?")


def test_every_image_is_a_full_version_in_one_place() -> None:
    images = {name: value for name, value in ENV.items() if name.endswith("_IMAGE")}
    assert set(images) == {"BASE_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE"}
    for image in images.values():
        assert FULL_TAG.fullmatch(image), image
    assert "-base-" in images["BASE_IMAGE"], "torch brings CUDA's libraries: a runtime or devel image holds them twice"
    used = {service["image"] for service in COMPOSE["services"].values()}
    ours = {f"fedeps-{name}:${{FEDEPS_VERSION}}" for name in ("setup", "server", "client")}
    assert used == {"${PROMETHEUS_IMAGE}", "${GRAFANA_IMAGE}", *ours}
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?", (ROOT / "docker/Dockerfile").read_text(), re.M)
    names = {name for _, name in stages}
    assert {source for source, _ in stages} - names == {"${BASE_IMAGE}"}


def test_a_floating_tag_is_no_full_version() -> None:
    """The negative control."""
    for image in ("debian", "debian:latest", "debian:12", "nvidia/cuda:13.2-base-ubuntu24.04"):
        assert not FULL_TAG.fullmatch(image)


def test_the_version_is_the_projects() -> None:
    assert f'\nversion = "{ENV["FEDEPS_VERSION"]}"\n' in (ROOT / "pyproject.toml").read_text()


def test_only_three_ports_are_published_on_loopback() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert {name: found for name, found in ports.items() if found} == {
        "server": ["${FEDEPS_BIND}:9092:9092"],
        "prometheus": ["${FEDEPS_BIND}:9090:9090"],
        "grafana": ["${FEDEPS_BIND}:3000:3000"],
    }
    assert ENV["FEDEPS_BIND"] == "127.0.0.1"


def test_no_service_has_more_rights_than_it_needs() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_setup_takes_the_parameters_of_make_run() -> None:
    assert sorted(COMPOSE["services"]["setup"]["environment"]) == sorted(NAMES)
