"""The few words of the Kubernetes API that a test's kubelet needs, over one connection per thread."""

import http.client
import json
import ssl
import threading
from pathlib import Path
from typing import Any

Object = dict[str, Any]


class ApiError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status = status


class Api:
    """A client with one user's token."""

    def __init__(self, port: int, authority: Path, token: str) -> None:
        self.port, self.authority, self.token = port, authority, token
        self._context = ssl.create_default_context(cafile=str(authority))
        self._local = threading.local()

    def get(self, path: str) -> Object:
        return self._call("GET", path)

    def items(self, path: str) -> list[Object]:
        """A list from the server's cache: cheap, and at most a moment old."""
        return self.get(f"{path}{'&' if '?' in path else '?'}resourceVersion=0")["items"]

    def create(self, path: str, body: Object) -> Object:
        return self._call("POST", path, body)

    def put(self, path: str, body: Object) -> Object:
        return self._call("PUT", path, body)

    def patch(self, path: str, body: Object) -> Object:
        return self._call("PATCH", path, body, "application/strategic-merge-patch+json")

    def delete(self, path: str, *, grace: int | None = None) -> None:
        self._call("DELETE", path if grace is None else f"{path}?gracePeriodSeconds={grace}")

    def _call(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> Object:
        payload = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind, "Accept": "application/json"}
        for attempt in (1, 2):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self._context, timeout=60)
                self._local.connection = connection
            try:
                connection.request(method, path, payload, headers)
                response = connection.getresponse()
                text = response.read().decode()
                break
            except (http.client.HTTPException, OSError):
                connection.close()
                self._local.connection = None  # an idle connection that the server has closed
                if attempt == 2:
                    raise
        if response.status >= 300:
            raise ApiError(response.status, text)
        return json.loads(text)
