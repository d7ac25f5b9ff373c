"""`/metrics` and `/healthz` of the server. The collector holds no numbers of its own: it reads the record at scrape."""

import socket
from collections.abc import Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common import http
from common.config import ConfigError, ServerSettings
from common.pki import certificate_expiry
from server.history import last_round, read_status
from server.preflight import LOOPBACK, host_and_port

_EVERYWHERE = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104 (where to reach what listens there)


class ServerCollector(Collector):
    """Every `fl_server_*` metric, from the status file, the current run's last line and the certificate."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings

    def collect(self) -> Iterator[Metric]:
        yield _gauge(
            "certificate_expiry_timestamp_seconds",
            "When the server's certificate ends, Unix time.",
            certificate_expiry(self._settings.certificate).timestamp(),
        )
        status = read_status(self._settings.state)
        if not status:
            return
        last = last_round(self._settings.runs / status["run"]) or {}
        yield _gauge("round", "The round that is under way, or the last one.", status["round"])
        yield CounterMetricFamily(
            "fl_server_rounds", "Rounds completed in the current run.", value=last.get("round", 0)
        )
        clients = GaugeMetricFamily(
            "fl_server_clients",
            "Partitions: connected and exhausted now; trained, refused and failed in the last completed round.",
            labels=["state"],
        )
        for state in ("connected", "exhausted"):
            clients.add_metric([state], len(status[state]))
        for state in ("trained", "refused", "failed"):
            clients.add_metric([state], len(last.get(state, ())))
        yield clients
        for name, key, text in (
            ("round_seconds", "seconds", "How long the last completed round took."),
            ("test_accuracy", "test_accuracy", "Accuracy of the global model on the task's public test set."),
            ("test_loss", "test_loss", "Mean loss of the global model on the task's public test set."),
        ):
            if last.get(key) is not None:
                yield _gauge(name, text, last[key])


def serve(settings: ServerSettings) -> None:
    """Answer on `metrics_address` until the process ends. Raises ConfigError if it is taken."""
    registry = CollectorRegistry()
    registry.register(ServerCollector(settings))
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            return metrics(environ, start)
        healthy = listens(settings.fleet_address)
        start("200 OK" if healthy else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if healthy else b"SuperLink does not listen\n"]

    try:
        http.serve(answer, settings.metrics_address)
    except OSError as error:
        raise ConfigError(
            f"server.metrics_address: cannot listen on {error.strerror} (stop what uses it, or choose another)"
        ) from error


def listens(address: str) -> bool:
    """Whether something accepts connections there."""
    host, port = host_and_port(address)
    try:
        socket.create_connection((_EVERYWHERE.get(host, host), port), timeout=1).close()
    except OSError:
        return False
    return True


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fl_server_{name}", text, value=value)
