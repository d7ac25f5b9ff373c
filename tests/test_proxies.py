"""Never through a proxy to loopback; where one stands before the server, a line names it and the way around.

gRPC itself is the oracle: a proxy that is asked, or is not, says whether what we tell of it is true.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import grpc
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest

from client.fleet import Fleet
from client.reach import proxy_in_the_way
from common import pki
from tests.federation import federation, free_ports, wait_for
from tests.hostile.fleet import serving
from tests.test_connection_faults import SEVERAL_TRIES, admitting, connected, said

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


class Proxy:
    """Takes connections, writes down what they ask for, and gives none."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.asked: list[str] = []
        threading.Thread(target=self._take, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends the accept
        self._listener.close()

    def _take(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(5)
                with suppress(OSError):
                    self.asked.append(peer.recv(1000).decode(errors="replace").partition("\r\n")[0])
                    peer.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """One that no variable names yet, whatever this machine's own environment says."""
    for name in (*PROXIES, "all_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with closing(Proxy()) as made:
        yield made


@pytest.fixture
def own_address() -> str:
    """An address of this machine that is not loopback. Nothing listens there, and no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = str(probe.getsockname()[0])
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return address


def variables(proxy: Proxy, *names: str) -> dict[str, str]:
    """These variables, each naming the proxy."""
    return dict.fromkeys(names, f"http://user:secret@127.0.0.1:{proxy.port}")


def test_loopback_is_reached_without_the_proxy(tmp_path: Path, proxy: Proxy) -> None:
    names = (*PROXIES, *(name.upper() for name in PROXIES), "all_proxy", "ALL_PROXY")
    with federation(tmp_path) as run, serving(admitting(run), run.fleet, tmp_path / "state/pki"):
        run.start_client(**variables(proxy, *names))
        wait_for(connected(run, *run.partitions), "the client to connect")
        assert proxy.asked == []
        assert "proxy" not in run.log("client")


def test_a_loopback_that_were_not_known_as_such_would_be_noticed(tmp_path: Path, proxy: Proxy) -> None:
    blind = (
        "import sys; from client import __main__, fleet, reach;"
        " fleet.is_loopback = reach.is_loopback = lambda _: False; sys.exit(__main__.main())"
    )
    with federation(tmp_path) as run, serving(admitting(run), run.fleet, tmp_path / "state/pki"):
        run.start("client", "-c", blind, "--policy", "policy.yaml", **variables(proxy, "http_proxy"))
        wait_for(lambda: proxy.asked, "the proxy to be asked", 60)
        assert proxy.asked[0].startswith(f"CONNECT {run.fleet} ")
        assert not connected(run, *run.partitions)()


def test_a_proxy_in_the_way_is_one_line_that_names_it_and_the_way_around(
    tmp_path: Path, proxy: Proxy, own_address: str
) -> None:
    with federation(tmp_path) as run:
        port = free_ports(1)[0]
        run.policy_content["client"]["server_address"] = f"{own_address}:{port}"
        run.configure()
        run.start_client(**variables(proxy, "https_proxy"))
        wait_for(lambda: all(said(run, name) for name in run.partitions), "the lines", 60)
        time.sleep(SEVERAL_TRIES)
        assert proxy.asked
        for name in run.partitions:
            (line,) = said(run, name)
            assert f"not reached through the proxy 127.0.0.1:{proxy.port} " in line
            assert f"no_proxy={own_address}" in line
        assert "secret" not in run.log("client")

        asked = len(proxy.asked)
        run.processes[0].terminate()
        assert run.processes[0].wait(timeout=30) == 0
        asked = len(proxy.asked)
        run.start_client(**variables(proxy, "https_proxy") | {"no_proxy": own_address})
        direct = f"not connected: {own_address}:{port}: Connection refused"
        wait_for(lambda: all(said(run, name)[-1].startswith(direct) for name in run.partitions), "the lines", 60)
        assert len(proxy.asked) == asked


@pytest.mark.parametrize(
    ("names", "exceptions", "asks"),
    [
        (("grpc_proxy",), {}, True),
        (("https_proxy",), {}, True),
        (("http_proxy",), {}, True),
        (("GRPC_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy"), {}, False),
        (("http_proxy",), {"no_proxy": "{address}"}, False),
        (("http_proxy",), {"no_proxy": "example.org, {address} ,localhost"}, False),
        (("http_proxy",), {"no_proxy": "{network}"}, False),
        (("http_proxy",), {"no_proxy": "{suffix}"}, False),
        (("http_proxy",), {"no_proxy": "example.org,198.51.100.0/24"}, True),
        (("http_proxy",), {"no_proxy": "*"}, True),
        (("http_proxy",), {"NO_PROXY": "{address}"}, True),
        (("http_proxy",), {"no_grpc_proxy": "{address}"}, False),
        (("http_proxy",), {"no_grpc_proxy": "example.org", "no_proxy": "{address}"}, True),
        (("http_proxy",), {"no_grpc_proxy": "", "no_proxy": "{address}"}, True),
        (("http_proxy",), {"grpc_proxy": ""}, False),
        (("http_proxy",), {"https_proxy": "https://127.0.0.1:1"}, False),
    ],
)
def test_what_is_said_of_a_proxy_is_what_grpc_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proxy: Proxy,
    own_address: str,
    names: tuple[str, ...],
    exceptions: dict[str, str],
    asks: bool,
) -> None:
    words = {"address": own_address, "network": f"{own_address}/20", "suffix": own_address[-3:]}
    settings = variables(proxy, *names) | {key: value.format(**words) for key, value in exceptions.items()}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    pki.create(tmp_path, partitions=[])
    address = f"{own_address}:{free_ports(1)[0]}"
    assert (proxy_in_the_way(address) is not None) == asks
    fleet = Fleet(address, tmp_path / "public/ca.crt")
    with pytest.raises(grpc.RpcError):
        fleet.stub.PullMessages(PullMessagesRequest(), timeout=5)
    fleet.close()
    assert bool(proxy.asked) == asks
