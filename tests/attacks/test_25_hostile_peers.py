"""Attack: a hostile peer on every port: truncated, oversized, malformed and slow messages, and floods of connections.

What holds: the process lives, whoever else asks is served, and memory and threads stay bounded: on the client's way to
its server (9092), on both metrics ports (9464, 9465), on SuperLink's Fleet port and on its Control API. Messages that
are well-formed gRPC and no honest Flower are in tests/test_hostile_fleet.py.
"""

import json
import os
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.inflatable.inflatable_object import get_object_id

from client.fleet import pack
from common import http
from tests.attacks.relay import Relay
from tests.attacks.site import Site, moved, question, site
from tests.federation import federation, metrics, wait_for
from tests.hostile.fleet import Sent

VICTIM, OTHER = 0, 1
PEERS = 150  # at once, on each port
MEGABYTES = 96  # by which an attack may make a process grow
PATIENCE = 60.0


def status(pid: int) -> dict[str, int]:
    """Threads, and megabytes of memory now and at the most (VmHWM)."""
    text = Path(f"/proc/{pid}/status").read_text()
    values = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 1}
    return {
        "threads": int(values["Threads"]), "now": int(values["VmRSS"]) // 1024, "most": int(values["VmHWM"]) // 1024
    }  # fmt: skip


@contextmanager
def bounded(pid: int, megabytes: int = MEGABYTES) -> Iterator[None]:
    """Asserts that the process lives, and how far it has grown at most in the meantime."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the most is from now on
    before = status(pid)["now"]
    yield
    assert status(pid)["most"] - before < megabytes, (before, status(pid))


# Bytes that no honest client of an HTTP server sends, and how they are sent.


def garbage(peer: socket.socket) -> None:
    peer.sendall(os.urandom(10_000))


def truncated(peer: socket.socket) -> None:
    peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: x")


def reset(peer: socket.socket) -> None:
    peer.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # an abortive close


def long_line(peer: socket.socket) -> None:
    peer.sendall(b"GET /" + b"x" * 2_000_000 + b" HTTP/1.1\r\n\r\n")


def many_headers(peer: socket.socket) -> None:
    peer.sendall(b"GET /metrics HTTP/1.1\r\n" + b"X-Header: x\r\n" * 5000 + b"\r\n")


def long_headers(peer: socket.socket) -> None:
    peer.sendall(b"GET /metrics HTTP/1.1\r\n" + (b"X-Header: " + b"x" * 60_000 + b"\r\n") * 90 + b"\r\n")


def large_body(peer: socket.socket) -> None:
    peer.sendall(b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000000000\r\n\r\n")
    for _ in range(80):
        peer.sendall(b"x" * 65536)


def negative_body(peer: socket.socket) -> None:
    peer.sendall(
        b"POST /metrics HTTP/1.1\r\nContent-Length: -1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n"
    )


def odd_paths(peer: socket.socket) -> None:
    peer.sendall(b"GET //../../etc/passwd?name[]=%00%ff&name[]=\xff HTTP/9.9\r\nAccept: \xff\xfe\r\n\r\n")


def tls(peer: socket.socket) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(ssl.SSLError):
        context.wrap_socket(peer, do_handshake_on_connect=True)


def other_protocol(peer: socket.socket) -> None:
    """HTTP/2 with a frame that announces 16 MB of settings."""
    peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x04\x00\x00\x00\x00\x00" + os.urandom(5000))


MALFORMED = (
    garbage, truncated, reset, long_line, many_headers, long_headers, large_body, negative_body, odd_paths, tls,
    other_protocol,
)  # fmt: skip


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def barrage(port: int) -> None:
    """Each of the malformed ones, several times; whether and what the server answers is its own business."""
    for attack in MALFORMED * 3:
        with suppress(OSError), connect(port) as peer:
            attack(peer)
            peer.settimeout(0.05)
            with suppress(OSError):
                peer.recv(1000)


@contextmanager
def crowd(port: int) -> Iterator[None]:
    """Peers that stay: some say nothing, some say a byte now and then, some ask and never read."""
    over = threading.Event()
    with ExitStack() as stack:
        peers = []
        for number in range(PEERS):
            with suppress(OSError):
                peers.append(stack.enter_context(connect(port)))
                peers[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                with suppress(OSError):
                    peers[-1].sendall(
                        [b"", b"GET /metrics HTTP/1.1\r\nX: ", b"GET /metrics HTTP/1.1\r\n\r\n"][number % 3]
                    )

        def drip() -> None:
            while not over.wait(0.3):
                for peer in peers[1::3]:
                    with suppress(OSError):
                        peer.send(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


# The client's side.


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Relay]]:
    with site(tmp_path_factory.mktemp("peers"), clients=2) as made, closing(Relay(made.port)) as relay:
        made.run.policy_content["client"] |= {"server_address": relay.address, "max_message_bytes": 20_000_000}
        made.run.configure()
        made.start(variant="eager")
        yield made, relay


def test_who_asks_for_metrics_is_served_among_hostile_peers(owner: tuple[Site, Relay]) -> None:
    made, _ = owner
    (client,), port, name = made.run.processes, made.run.client_metrics, made.run.partitions[VICTIM]
    before = status(client.pid)
    with bounded(client.pid):
        barrage(port)
        assert metrics(port)["fl_client_connected", name] == 1
        with crowd(port):
            for _ in range(5):
                assert metrics(port)["fl_client_connected", name] == 1
            moved(made.ask(VICTIM))
            assert status(client.pid)["threads"] <= before["threads"] + http.MOST_CONNECTIONS + 8
        wait_for(lambda: status(client.pid)["threads"] <= before["threads"] + 4, "the threads to end", PATIENCE)
    assert "Traceback" not in made.run.log("client")
    assert made.run.log("client").count("\n") < 50, "a peer can fill the log"


def _answer(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:  # noqa: ARG001
    start("200 OK", [])
    return [b"well"]


def test_a_server_without_the_bound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: the same crowd, and nothing that sends the oldest away."""
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 10**6)
    server = http.serve(_answer, "127.0.0.1:0")
    before = threading.active_count()
    with crowd(server.server_port):
        wait_for(lambda: threading.active_count() > before + 60, "a thread for each", 9)
    server.shutdown()
    server.server_close()


def close_at_once(_: socket.socket) -> None:
    """Takes the connection, and nothing else."""


def garble(peer: socket.socket) -> None:
    peer.sendall(os.urandom(100_000))


def cut_the_handshake(peer: socket.socket) -> None:
    peer.recv(1000)
    peer.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")  # 16 kB of handshake are announced
    peer.sendall(os.urandom(50))


def stay_silent(peer: socket.socket) -> None:
    peer.settimeout(5)
    while peer.recv(65536):
        pass


def trickle(peer: socket.socket) -> None:
    peer.recv(1000)
    for byte in b"\x16\x03\x03\x00\x7a" + bytes(40):
        peer.sendall(bytes([byte]))
        time.sleep(0.1)


def behind_tls(pki: Path, says: bytes) -> Callable[[socket.socket], None]:
    """The true server's certificate, and no HTTP/2 behind it that makes sense."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server/server.crt", pki / "server/server.key")
    context.set_alpn_protocols(["h2"])

    def speak(peer: socket.socket) -> None:
        peer.settimeout(5)
        with suppress(OSError), context.wrap_socket(peer, server_side=True) as secret:
            secret.sendall(says)
            while secret.recv(65536):
                pass

    return speak


SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def test_a_server_that_speaks_anything_but_grpc_is_outlived(owner: tuple[Site, Relay]) -> None:
    made, relay = owner
    pki = made.folder / "state/pki"
    frames = {
        "garbage": os.urandom(100_000),
        "a frame of 16 MB": SETTINGS + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(2_000_000),
        "a flood of settings": SETTINGS * 100_000,
        "a flood of pings": SETTINGS + (b"\0\0\x08\6\0\0\0\0\0" + bytes(8)) * 100_000,
        "endless headers": SETTINGS + (b"\0\x40\0\x09\0\0\0\0\1" + b"\x0f" * 0x4000) * 100,
    }
    attacks = [close_at_once, garble, cut_the_handshake, stay_silent, trickle]
    (client,) = made.run.processes
    with bounded(client.pid):
        for attack in (*attacks, *(behind_tls(pki, says) for says in frames.values())):
            before, relay.instead = relay.connections, attack
            relay.cut()
            wait_for(lambda before=before: relay.connections > before, "the client to try again", PATIENCE)
            time.sleep(0.5)  # in which it hears what there is to hear
            assert client.poll() is None
            assert metrics(made.run.client_metrics)["fl_privacy_ledger_ok", made.run.partitions[VICTIM]] == 1
        relay.instead = None
        relay.cut()
        moved(made.ask(VICTIM))
        moved(made.ask(OTHER))
    assert "an error of ours" not in made.run.log("client")


def inflated(objects: int, size: int) -> Sent:
    """An honest message with as many objects more, each of this size."""
    sent = Sent.whole(pack(question()))
    for number in range(objects):
        content = number.to_bytes(8, "big") + bytes(size)
        name = get_object_id(content)
        sent.objects[name] = content
        sent.trees[0].children.add(object_id=name)
    return sent


UNANSWERED = "a message stays unanswered"


def test_an_oversized_message_costs_its_partition_alone(owner: tuple[Site, Relay]) -> None:
    made, _ = owner
    (client,) = made.run.processes
    before = made.account(VICTIM).sequence
    with bounded(client.pid, 160):
        for oversized in (inflated(250, 10**6), inflated(1, 200 * 10**6), inflated(6, 4 * 10**6)):
            count = made.run.log("client").count(UNANSWERED)
            made.tell(VICTIM, oversized)
            moved(made.ask(OTHER))
            wait_for(lambda count=count: made.run.log("client").count(UNANSWERED) > count, "the refusal", PATIENCE)
    assert made.account(VICTIM).sequence == before
    moved(made.ask(VICTIM))  # and it is not held for long


def test_a_client_that_takes_all_is_caught(tmp_path: Path) -> None:
    """The control: with a bound that is far away the same message is in memory, all of it."""

    def grows() -> None:
        with bounded(client.pid, 160):
            made.tell(VICTIM, inflated(250, 10**6))
            assert made.hear(VICTIM) is not None

    with site(tmp_path, clients=1) as made:
        client = made.start()
        with pytest.raises(AssertionError, match="'most'"):
            grows()


# The server's side: a real SuperLink, and a run that goes on meanwhile.


def test_a_run_goes_on_while_every_port_of_the_server_is_attacked(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=8, steps_per_round=1, privacy={"noise_multiplier": 30.0}) as run:
        server = run.start_server()
        ports = (run.server_metrics, int(run.fleet.rpartition(":")[2]), run.control)
        wait_for(lambda: all(_listens(port) for port in ports), "all ports", 120)
        threads = [threading.Thread(target=barrage, args=(port,)) for port in ports]
        with bounded(server.pid), ExitStack() as stack:
            for port, thread in zip(ports, threads, strict=True):
                stack.enter_context(crowd(port))
                thread.start()
            run.start_client()
            wait_for(lambda: _rounds(tmp_path) >= 2, "rounds among hostile peers", 180)
            assert _serves(run.server_metrics)
            assert status(server.pid)["threads"] < http.MOST_CONNECTIONS + 16
            for thread in threads:
                thread.join(PATIENCE)
        assert server.wait(timeout=180) == 0, run.log("server")
        summary = json.loads((tmp_path / "runs/latest/summary.json").read_text())
        assert summary["rounds_completed"] == 8
        assert "Traceback" not in run.log("client")


def _rounds(folder: Path) -> int:
    path = folder / "runs/latest/rounds.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _listens(port: int) -> bool:
    with suppress(OSError), connect(port):
        return True
    return False


def _serves(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return b"fl_server_" in response.read()
    return False
