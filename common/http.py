"""A small HTTP server for `/metrics` and `/healthz`, on a thread of its own. No peer can take it from the others.

`python -m common.http HOST:PORT PATH` asks one, never through a proxy, and exits 0 if the answer is 200: a container's
health check needs nothing else installed.
"""

import http.client
import logging
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


MOST_CONNECTIONS = 16

log = logging.getLogger(__name__)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread per connection, and no more than `MOST_CONNECTIONS` of them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._connections: deque[Any] = deque()
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Of too many peers the one that is here the longest goes: an honest one is served in milliseconds."""
        with self._lock:
            self._connections.append(request)
            if len(self._connections) > MOST_CONNECTIONS:
                with suppress(OSError):
                    self._connections.popleft().shutdown(socket.SHUT_RDWR)  # which ends its thread
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock, suppress(ValueError):
            self._connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A peer that breaks off writes no traceback into our log."""
        log.debug("%s: broken off", client_address, exc_info=True)

    def server_bind(self) -> None:
        """Without the standard library's reverse look-up of our own name, which can stall a start."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds that a silent peer may hold a thread

    def log_message(self, *_: Any) -> None:
        """Scrapes are not logged."""


def serve(application: Application, address: str) -> WSGIServer:
    """Serves `application` at `host:port` until the process ends.

    Raises:
        OSError: the address cannot be had; its text names the address.
    """
    host, port = address.rsplit(":", 1)
    kind = _ServerV6 if host.startswith("[") else _Server
    try:
        server = make_server(host.strip("[]"), int(port), application, kind, _Handler)
    except OSError as error:
        raise OSError(error.errno, f"{address}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def ask(address: str, path: str) -> tuple[int, str]:
    """The status and body of a GET. Raises OSError or HTTPException if there is no answer."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def main(arguments: list[str]) -> int:
    address, path = arguments
    try:
        status, body = ask(address, path)
    except (OSError, http.client.HTTPException) as error:
        status, body = 0, f"{address}: {error}"
    print(body.strip())
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
