"""A client that cannot serve says why in one line, ends with 1 and leaves no process behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.federation import Federation, children, command, federation, wait_for


def all_keys_missing(run: Federation) -> None:
    shutil.rmtree(run.folder / "state/pki/clients")


def no_authority(run: Federation) -> None:
    (run.folder / "state/pki/public/ca.crt").unlink()


def key_for_an_authority(run: Federation) -> None:
    shutil.copyfile(run.folder / "state/pki/ca/ca.key", run.folder / "state/pki/public/ca.crt")


def empty_authority(run: Federation) -> None:
    (run.folder / "state/pki/public/ca.crt").write_bytes(b"")


def port_taken(run: Federation) -> socket.socket:
    return socket.create_server(("127.0.0.1", run.client_metrics))


def no_such_port(run: Federation) -> None:
    run.policy_content["client"]["metrics_address"] = "127.0.0.1:99999"
    run.configure()


def foreign_interface(run: Federation) -> None:
    run.policy_content["client"]["metrics_address"] = "198.51.100.1:9464"
    run.configure()


def nothing_compiles(run: Federation) -> None:
    run.policy_content["training"]["gradient_mode"] = "compiled"
    run.configure()


STARTS: dict[Callable[[Federation], Any], tuple[str, ...]] = {
    all_keys_missing: ("no partition has a key that can be used: state/pki/clients/digits-0-of-2/key: No such file",),
    no_authority: ("client.ca_certificate: state/pki/public/ca.crt: No such file or directory",),
    key_for_an_authority: ("client.ca_certificate: state/pki/public/ca.crt: expected a PEM certificate",),
    empty_authority: ("client.ca_certificate: state/pki/public/ca.crt: expected a PEM certificate",),
    port_taken: ("client.metrics_address: 127.0.0.1:", "Address already in use", "choose another"),
    no_such_port: ("client.metrics_address: ", "0-65535"),
    nothing_compiles: ("training.gradient_mode: compiled: ", "no-such-compiler", "(use auto)"),
    foreign_interface: ("client.metrics_address: 198.51.100.1:9464: Cannot assign requested address",),
}


@pytest.mark.parametrize("fault", STARTS, ids=lambda fault: fault.__name__)
def test_a_client_that_cannot_serve_says_why_and_leaves_nothing(
    tmp_path: Path, fault: Callable[[Federation], Any]
) -> None:
    with federation(tmp_path) as run:
        with closing(fault(run) or socket.socket()):
            client = run.start_client(CXX="no-such-compiler")
            assert client.wait(timeout=60) == 1, run.log("client")
        words = [line for line in run.log("client").splitlines() if " INFO " not in line]
        assert len(words) == 1, words
        assert all(part in words[0] for part in STARTS[fault]), words
        wait_for(lambda: not inhabitants(tmp_path), "the end of all its processes", 30)


@pytest.mark.parametrize("moment", ["", "ready to fork workers"], ids=["at once", "when it waits"])
def test_a_client_whose_zygote_dies_ends_also_without_a_message(tmp_path: Path, moment: str) -> None:
    with federation(tmp_path) as run:  # there is no server
        client = run.start_client()
        (zygote,) = wait_for(lambda: moment in run.log("client") and children(client.pid), "the zygote", 60)
        os.kill(zygote, signal.SIGKILL)
        assert client.wait(timeout=30) == 1, run.log("client")
        assert "no worker can be forked any more: the process that forks them has ended" in run.log("client")
        wait_for(lambda: not inhabitants(tmp_path), "the end of all its processes", 30)


def inhabitants(folder: Path) -> list[int]:
    """Processes that work in the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cwd").resolve().is_relative_to(folder) and "client" in command(int(entry.name)):
                found.append(int(entry.name))
    return found


def test_inhabitants_are_seen(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "'client'; import time; time.sleep(60)"], cwd=tmp_path)
    try:
        wait_for(lambda: inhabitants(tmp_path) == [process.pid], "the process to be found", 10)
    finally:
        process.kill()
        process.wait()
