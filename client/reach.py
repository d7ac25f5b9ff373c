"""Why a server cannot be reached: the certificate, the address, or a proxy that gRPC was told of."""

import ipaddress
import os
import socket
import ssl
from contextlib import suppress
from pathlib import Path

_CERTIFICATE_FIXES = {  # by OpenSSL's verify codes
    9: "it is valid from a later time: compare this clock with the server's",
    10: "on the server: python -m common.pki renew",
    62: "client.server_address must be one of its names; on the server: python -m common.pki renew --san NAME",
    64: "client.server_address must be one of its names; on the server: python -m common.pki renew --san ADDRESS",
}


def why_not(address: str, ca_certificate: Path) -> str:
    """One line for a person, found by trying what gRPC tries."""
    host, port = split_address(address)
    if proxy := proxy_in_the_way(address):
        return f"{address}: not reached through the proxy {proxy} (to go without it: no_proxy={host})"
    try:
        context = ssl.create_default_context(cafile=str(ca_certificate))
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return f"{address}: TLS works, the server does not answer yet"
    except ssl.SSLCertVerificationError as error:
        fix = _CERTIFICATE_FIXES.get(error.verify_code, f"{ca_certificate} is not the CA of this server")
        return f"{address}: the server's certificate is refused: {error.verify_message.rstrip('.')} ({fix})"
    except ssl.SSLError as error:
        return f"{address}: no TLS: {error.reason or error} (is this the server's Fleet address?)"
    except (OSError, OverflowError) as error:
        text = getattr(error, "strerror", None) or error
        return f"{address}: {text} (is the server running, and is client.server_address right?)"


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as host and port."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host = split_address(address)[0]
    return host in ("localhost", "::1") or host.startswith("127.")


def proxy_in_the_way(address: str) -> str | None:
    """The proxy, less its password, that gRPC uses for `address`.

    It reads these variables in lower case only, takes the first that is set, be it empty, and speaks plain HTTP to it.
    """
    if is_loopback(address):
        return None
    host = split_address(address)[0]
    proxy = _first_set("grpc_proxy", "https_proxy", "http_proxy")
    exceptions = _first_set("no_grpc_proxy", "no_proxy").split(",")
    if not proxy.startswith("http://") or any(_excepted(host, entry.strip()) for entry in exceptions if entry.strip()):
        return None
    return proxy.removeprefix("http://").rpartition("@")[2]


def _first_set(*names: str) -> str:
    return next((os.environ[name] for name in names if name in os.environ), "")


def _excepted(host: str, entry: str) -> bool:
    """Whether an entry of `no_proxy`, a suffix or a network, covers the host."""
    if host.lower().endswith(entry.lower()):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    return False
