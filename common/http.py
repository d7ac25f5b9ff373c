"""A small HTTP server for `/metrics` and `/healthz`, on a thread of its own."""

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True


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
    try:
        server = make_server(host.strip("[]"), int(port), application, _Server, _Handler)
    except OSError as error:
        raise OSError(error.errno, f"{address}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
