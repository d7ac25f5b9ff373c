"""What keeps `python -m server` from starting: one line that names key, value and fix, exit 2, nothing left behind."""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import certificates, pki
from common.files import hold
from server.__main__ import main
from tests.federation import children, free_ports

Spoil = Callable[[Path, dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pki.create(tmp_path / "state/pki", partitions=["a"])
    return tmp_path


def other_authority(folder: Path, _: dict[str, Any]) -> None:
    pki.create(folder / "other", partitions=[])
    shutil.copyfile(folder / "other/public/ca.crt", folder / "state/pki/public/ca.crt")


def other_key(folder: Path, content: dict[str, Any]) -> None:
    pki.create(folder / "other", partitions=[])
    content["server"]["certificate_key"] = str(folder / "other/server/server.key")


def expired(folder: Path, _: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        today = certificates.now()
        patch.setattr(certificates, "now", lambda: today - timedelta(days=10))
        pki.renew_server(folder / "state/pki", days=2)


def foreign_name(folder: Path, _: dict[str, Any]) -> None:
    pki_folder = folder / "state/pki"
    ca_key, key = (certificates.load_key(pki_folder / name) for name in ("ca/ca.key", "server/server.key"))
    ca = certificates.load_certificate(pki_folder / "public/ca.crt")
    names = [certificates.general_name("fl.example.org")]
    made = certificates.server(key, names, ca=ca, ca_key=ca_key, days=5)
    (pki_folder / "server/server.crt").resolve().write_bytes(made)


def taken(key: str) -> Spoil:
    def spoil(_: Path, content: dict[str, Any]) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        content["server"][key] = port if key == "control_port" else f"127.0.0.1:{port}"
        return listener

    return spoil


@pytest.mark.parametrize(
    ("spoil", "line"),
    {
        "task": (lambda _, content: content.update(task="digit"), "task: unknown 'digit'; expected one of digits, "),
        "rounds": (lambda _, content: content.update(rounds=0), "federation.yaml: rounds: "),
        "no keys": (lambda folder, _: (folder / "state/pki/public/clients/a.pub").unlink(), "server.public_keys: no <"),
        "no certificate": (
            lambda _, content: content["server"].update(certificate="no.crt"), "server.certificate: no.crt: No such"),
        "no key": (
            lambda folder, _: (folder / "state/pki/server/server.key").unlink(), "server.certificate_key: state/pki"),
        "another key": (other_key, "server.certificate: state/pki/server/server.crt does not go with"),
        "another authority": (other_authority, "server.certificate: state/pki/server/server.crt: "),
        "no certificate in it": (
            lambda folder, _: (folder / "state/pki/public/ca.crt").write_text("hello"), "server.ca_certificate: state"),
        "expired": (expired, "server.certificate: state/pki/server/server.crt: certificate has expired"),
        "not ours": (foreign_name, "server.certificate: state/pki/server/server.crt: IP address mismatch"),
        "fleet port": (taken("fleet_address"), "server.fleet_address: cannot listen on 127.0.0.1:"),
        "control port": (taken("control_port"), "server.control_port: cannot listen on 127.0.0.1:"),
        "metrics port": (taken("metrics_address"), "server.metrics_address: cannot listen on 127.0.0.1:"),
    }.values(),
)  # fmt: skip
def test_what_cannot_work_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, line: str
) -> None:
    fleet, control, metrics = free_ports(3)
    server = {
        "fleet_address": f"127.0.0.1:{fleet}", "control_port": control, "metrics_address": f"127.0.0.1:{metrics}",
    }  # fmt: skip
    content: dict[str, Any] = {"steps_per_round": 1, "learning_rate": 1.0, "server": server}
    kept = spoil(folder, content)
    (folder / "federation.yaml").write_text(yaml.safe_dump(content))
    assert main(["--config", "federation.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m server: {line}")
    assert said.count("\n") == 1
    assert children(os.getpid()) == []
    if isinstance(kept, socket.socket):
        kept.close()


def test_one_server_at_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "federation.yaml").write_text("steps_per_round: 1\nlearning_rate: 1.0\n")
    (folder / "state/server").mkdir()
    with hold(folder / "state/server/server.lock"):
        assert main(["--config", "federation.yaml"]) == 2
    assert "state/server is in use by another python -m server" in capsys.readouterr().err
