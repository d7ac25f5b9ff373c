"""Everything that can be known to fail before a process is started, each as one line that names key, value and fix."""

import socket
import ssl
from pathlib import Path

from common.config import ConfigError, Federation, ServerSettings
from common.tasks import SHIPPED

LOOPBACK = "127.0.0.1"


def check(config: Federation) -> None:
    """Raises ConfigError for the first thing that would keep the server from working."""
    server = config.server
    if config.task not in SHIPPED and ":" not in config.task:
        raise ConfigError(f"task: unknown {config.task!r}; expected one of {', '.join(SHIPPED)}, or module:attribute")
    registered(server)
    _check_files(server)
    _check_handshake(server)
    check_port("server.fleet_address", server.fleet_address)
    check_port("server.control_port", f"{LOOPBACK}:{server.control_port}")
    check_port("server.metrics_address", server.metrics_address)


def registered(server: ServerSettings) -> dict[str, Path]:
    """The public key of every partition that may join, by the partition's name. Raises ConfigError for none."""
    keys = {path.stem: path for path in sorted(server.public_keys.glob("*.pub"))}
    if not keys:
        raise ConfigError(
            f"server.public_keys: no <partition>.pub in {server.public_keys}"
            " (python -m common.pki create PARTITION... makes them)"
        )
    return keys


def host_and_port(address: str) -> tuple[str, int]:
    """`[::1]:9092` as ("::1", 9092)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def check_port(key: str, address: str) -> None:
    """Raises ConfigError unless the address can be listened on. gRPC itself would share a taken port in silence."""
    host, port = host_and_port(address)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{key}: cannot listen on {address}: {error} (stop what uses it, or choose another)"
        ) from error


def _check_files(server: ServerSettings) -> None:
    for key in ("ca_certificate", "certificate", "certificate_key"):
        path: Path = getattr(server, key)
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"server.{key}: {path}: {error.strerror} (python -m common.pki create makes it)"
            ) from error


def _check_handshake(server: ServerSettings) -> None:
    """Shake hands in memory as a client would: key, chain, dates and names are checked by what checks them later."""
    try:
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ours.load_cert_chain(server.certificate, server.certificate_key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"server.certificate: {server.certificate} does not go with server.certificate_key"
            f" {server.certificate_key}: {error.reason or error} (python -m common.pki renew makes a new pair)"
        ) from error
    try:
        theirs = ssl.create_default_context(cafile=str(server.ca_certificate))
    except ssl.SSLError as error:
        raise ConfigError(f"server.ca_certificate: {server.ca_certificate}: {error.reason or error}") from error

    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    # SuperLink's helpers and Flower's command line reach it by this address.
    client = theirs.wrap_bio(to_client, to_server, server_hostname=LOOPBACK)
    listener = ours.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(2):  # hello, hello and certificate, finished: two turns of TLS 1.3
            for side in (client, listener):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"server.certificate: {server.certificate}: {error.verify_message}"
            f" (checked as {LOOPBACK} against server.ca_certificate {server.ca_certificate};"
            " python -m common.pki renew makes a new one)"
        ) from error
