"""`python -m common.http`: a container's health check, which must never be answered by anybody but its own program."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from common.http import serve
from tests.federation import ROOT, free_ports

STATUS = {"/fine": "200 OK", "/ill": "503 Service Unavailable"}


@pytest.fixture
def address() -> Iterator[str]:
    def application(environ: dict[str, Any], start: Any) -> list[bytes]:
        status = STATUS.get(environ["PATH_INFO"], "404 Not Found")
        start(status, [("Content-Type", "text/plain")])
        return [f"it is {status}\n".encode()]

    server = serve(application, "127.0.0.1:0")
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def check(address: str, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "common.http", address, path]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(("path", "code"), [("/fine", 0), ("/ill", 1), ("/none", 1)])
def test_only_200_is_healthy(address: str, path: str, code: int) -> None:
    ended = check(address, path)
    assert (ended.returncode, ended.stdout) == (code, f"it is {STATUS.get(path, '404 Not Found')}\n")


def test_a_program_that_does_not_listen_is_not_healthy() -> None:
    (port,) = free_ports(1)
    ended = check(f"127.0.0.1:{port}", "/fine")
    assert ended.returncode == 1
    assert ended.stdout == f"127.0.0.1:{port}: [Errno 111] Connection refused\n"


def test_no_proxy_is_asked(address: str) -> None:
    dead = "http://127.0.0.1:9"
    assert check(address, "/fine", http_proxy=dead, HTTP_PROXY=dead, no_proxy="").returncode == 0
