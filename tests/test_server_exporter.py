"""`/metrics` of the server: the names of the design, with the numbers of the record."""

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from common import pki
from common.config import ConfigError, ServerSettings
from server import exporter
from server.exporter import ServerCollector
from server.history import History, write_status
from tests.federation import free_ports

DESIGN = {
    "fl_server_round", "fl_server_rounds_total", "fl_server_round_seconds", "fl_server_clients",
    "fl_server_test_accuracy", "fl_server_test_loss", "fl_server_certificate_expiry_timestamp_seconds",
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    pki.create(tmp_path / "pki", partitions=["a"])
    state = tmp_path / "state"
    state.mkdir()
    fleet, metrics = free_ports(2)
    return ServerSettings(
        certificate=tmp_path / "pki/server/server.crt",
        state=state,
        runs=tmp_path / "runs",
        fleet_address=f"127.0.0.1:{fleet}",
        metrics_address=f"127.0.0.1:{metrics}",
    )


def run(settings: ServerSettings, rounds: int) -> None:
    history = History(settings.runs, "one", round=0)
    for number in range(1, rounds + 1):
        history.append(
            {
                "round": number, "seconds": 1.5 * number,
                "trained": ["a", "b"], "refused": {"c": "policy"}, "failed": {},
                "test_accuracy": 0.5 + number / 10, "test_loss": 1.0 / number,
            }
        )  # fmt: skip
    status = {"run": "one", "round": rounds + 1, "rounds": 5, "connected": ["a", "b", "c"], "exhausted": ["d"]}
    write_status(settings.state, status)


def test_every_name_of_the_design_with_the_numbers_of_the_record(settings: ServerSettings) -> None:
    registry = CollectorRegistry()
    registry.register(ServerCollector(settings))
    run(settings, 3)
    samples = {sample.name for metric in registry.collect() for sample in metric.samples}
    assert samples == DESIGN
    expected = {
        "fl_server_round": 4.0, "fl_server_rounds_total": 3.0, "fl_server_round_seconds": 4.5,
        "fl_server_test_accuracy": 0.8, "fl_server_test_loss": 1 / 3,
        "fl_server_certificate_expiry_timestamp_seconds": pki.certificate_expiry(settings.certificate).timestamp(),
    }  # fmt: skip
    for name, value in expected.items():
        assert registry.get_sample_value(name) == pytest.approx(value)
    states = {"connected": 3, "trained": 2, "refused": 1, "failed": 0, "exhausted": 1}
    for state, value in states.items():
        assert registry.get_sample_value("fl_server_clients", {"state": state}) == value

    run(settings, 4)  # nothing is kept between two scrapes
    assert registry.get_sample_value("fl_server_rounds_total") == 4
    pki.renew_server(settings.certificate.parent.parent, days=3)
    renewed = pki.certificate_expiry(settings.certificate).timestamp()
    assert registry.get_sample_value("fl_server_certificate_expiry_timestamp_seconds") == renewed


def test_before_the_first_round_there_are_no_invented_numbers(settings: ServerSettings) -> None:
    registry = CollectorRegistry()
    registry.register(ServerCollector(settings))
    certificate = {"fl_server_certificate_expiry_timestamp_seconds"}
    assert {sample.name for metric in registry.collect() for sample in metric.samples} == certificate
    run(settings, 0)
    assert registry.get_sample_value("fl_server_rounds_total") == 0
    assert registry.get_sample_value("fl_server_test_accuracy") is None


def test_it_is_healthy_once_superlink_listens(settings: ServerSettings) -> None:
    exporter.serve(settings)
    run(settings, 2)
    base = f"http://{settings.metrics_address}"
    with urllib.request.urlopen(f"{base}/metrics", timeout=5) as response:  # noqa: S310 (loopback)
        assert re.search(rb"^fl_server_rounds_total 2.0$", response.read(), re.MULTILINE)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{base}/healthz", timeout=5)  # noqa: S310
    host, port = settings.fleet_address.split(":")
    with (
        socket.create_server((host, int(port))),
        urllib.request.urlopen(f"{base}/healthz", timeout=5) as response,  # noqa: S310
    ):
        assert response.status == 200

    with pytest.raises(ConfigError, match=f"server.metrics_address: cannot listen on {settings.metrics_address}"):
        exporter.serve(settings)
