"""A wire between client and server that a test can cut: bytes pass as they are, until they do not."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class Relay:
    """Forwards connections to a port of this machine."""

    def __init__(self, port: int) -> None:
        self.dead = False  # while it is, connections are taken and closed at once
        self.instead: Callable[[socket.socket], None] | None = None  # speaks to the client in the server's place
        self.connections = 0
        self._port = port
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends what is connected now, in the middle of whatever it says."""
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends the accept
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.instead is not None:
                self._open.add(client)
                threading.Thread(target=self._speak, args=(self.instead, client), daemon=True).start()
                continue
            try:
                if self.dead:
                    raise ConnectionResetError
                server = socket.create_connection(("127.0.0.1", self._port), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _speak(self, instead: Callable[[socket.socket], None], client: socket.socket) -> None:
        with client, suppress(OSError):
            instead(client)
        self._open.discard(client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()
