"""The server's processes on a real SuperLink with TLS and node keys: they come back after a kill and go when told."""

import json
import os
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.files import is_held
from common.pki import certificate_expiry
from server.preflight import check_port
from tests.federation import Federation, command, descendants, federation, wait_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("server")) as made:
        yield made


def one(server: subprocess.Popen[bytes], name: str) -> int:
    """The process of that name below the server."""
    return wait_for(lambda: [pid for pid in descendants(server.pid) if name in command(pid)], name)[0]


def alive(pid: int) -> bool:
    return command(pid) != ""  # an ended process that nobody waited for has none


def ports(run: Federation) -> list[int]:
    return [int(run.fleet.rpartition(":")[2]), run.control, run.server_metrics]


def get(run: Federation, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{run.server_metrics}{path}", timeout=10) as answer:
        return answer.read().decode()


def rounds_begun(run: Federation) -> int:
    return run.log("server").count(": waiting for 2 partitions")


@pytest.mark.long
def test_a_killed_serverapp_comes_back_and_a_second_server_is_refused(run: Federation) -> None:
    server = run.start_server()
    wait_for(lambda: rounds_begun(run) == 1, "a ServerApp that waits for clients")
    second = run.start_server()
    assert second.wait(timeout=20) == 2
    assert "state/server is in use by another python -m server" in run.log("server")
    superlink = one(server, "flower-superlink")
    os.kill(one(server, "flwr-serverapp"), signal.SIGKILL)
    wait_for(lambda: rounds_begun(run) == 2, "another ServerApp")
    assert "the ServerApp ended without an outcome (crash 1 of at most 5" in run.log("server")
    assert not alive(superlink)  # whose state still had the old run

    below = descendants(server.pid)
    server.kill()  # the server itself, outright
    server.wait()
    wait_for(lambda: not any(map(alive, below)), "the end of all that it started", 30)

    server = run.start_server()  # at once, on the same ports
    wait_for(lambda: rounds_begun(run) == 3, "a run that goes on")
    assert len(list((run.folder / "runs").iterdir())) == 2  # one run and `latest`
    below = descendants(server.pid)
    server.terminate()
    assert server.wait(timeout=20) == 128 + signal.SIGTERM
    assert not any(map(alive, below))
    assert not is_held(run.folder / "state/server/server.lock")
    for port in ports(run):
        check_port("port", f"127.0.0.1:{port}")  # raises when it is taken


def test_ctrl_c_while_superlink_starts_leaves_nothing(run: Federation) -> None:
    server = run.start_server()
    superlink = one(server, "flower-superlink")
    below = descendants(server.pid)
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=20) == 128 + signal.SIGINT
    assert not any(map(alive, [superlink, *below]))


def test_the_control_api_is_on_loopback_and_speaks_tls_only(run: Federation) -> None:
    before = rounds_begun(run)
    server = run.start_server(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    wait_for(lambda: rounds_begun(run) > before, "a run, submitted and started in spite of a dead proxy")
    sockets = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    assert f"0100007F:{run.control:04X}" in sockets
    assert f"00000000:{run.control:04X}" not in sockets
    trusted = ssl.create_default_context(cafile=str(run.folder / "state/pki/public/ca.crt"))
    plain = urllib.request.ProxyHandler({})
    opener = urllib.request.build_opener(plain, urllib.request.HTTPSHandler(context=trusted))
    assert opener.open(f"https://127.0.0.1:{run.control}/health", timeout=5).status == 200
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.build_opener(plain).open(f"http://127.0.0.1:{run.control}/health", timeout=5)
    server.terminate()
    server.wait(timeout=20)


def test_a_taken_port_is_one_line_and_nothing_is_started(run: Federation) -> None:
    for port in ports(run):
        before = run.log("server")
        with socket.create_server(("127.0.0.1", port)):
            assert run.start_server().wait(timeout=20) == 2
        said = run.log("server").removeprefix(before)
        assert said.count("\n") == 1
        assert said.startswith("python -m server: server.")
        assert f"cannot listen on 127.0.0.1:{port}" in said


def test_a_torn_checkpoint_ends_the_server_with_one_clear_line(tmp_path: Path) -> None:
    torn = (4096).to_bytes(8, "little") + b'{"model.weight": '
    with federation(tmp_path) as run:
        path = run.folder / "state/server/checkpoint.safetensors"
        path.parent.mkdir()
        path.write_bytes(torn)
        server = run.start_server()
        assert server.wait(timeout=60) == 2
        (line,) = [line for line in run.log("server").splitlines() if "cannot be read" in line]
        assert line.startswith("python -m server: server.state: state/server/checkpoint.safetensors cannot be read")
        assert "restore it" in line
        assert path.read_bytes() == torn  # neither replaced nor removed


def test_the_exporter_shows_the_record_of_a_run(run: Federation) -> None:
    run.federation_content["rounds"] = 500
    run.policy_content["privacy"]["noise_multiplier"] = 20.0
    run.configure()
    server = run.start_server()
    run.start_client()
    history = run.folder / "runs/latest/rounds.jsonl"
    wait_for(lambda: history.exists() and history.read_text().count("\n") >= 2, "two rounds")
    os.kill(one(server, "flwr-serverapp"), signal.SIGSTOP)  # so that the record stands still
    assert get(run, "/healthz") == "ok\n"
    status = json.loads((run.folder / "state/server/status.json").read_text())
    last = json.loads(history.read_text().splitlines()[-1])
    shown = {line.split()[0]: float(line.split()[1]) for line in get(run, "/metrics").splitlines() if line[:3] == "fl_"}
    expiry = certificate_expiry(run.folder / "state/pki/server/server.crt").timestamp()
    assert shown == {
        "fl_server_round": status["round"],
        "fl_server_rounds_total": last["round"],
        "fl_server_round_seconds": last["seconds"],
        'fl_server_clients{state="connected"}': 2,
        'fl_server_clients{state="exhausted"}': 0,
        'fl_server_clients{state="trained"}': len(last["trained"]),
        'fl_server_clients{state="refused"}': len(last["refused"]),
        'fl_server_clients{state="failed"}': len(last["failed"]),
        "fl_server_test_accuracy": last["test_accuracy"],
        "fl_server_test_loss": last["test_loss"],
        "fl_server_certificate_expiry_timestamp_seconds": expiry,
    }
    server.terminate()
    server.wait(timeout=20)
