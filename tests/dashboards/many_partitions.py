"""Hundreds of partitions, to see that rules and dashboards cope: made-up figures, real names."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from common import http
from common.messages import Reason
from tests.dashboards.panels import Window
from tests.dashboards.prometheus import Prometheus, prometheus
from tests.federation import free_ports

ROUNDS = 100  # that each budget covers
BUDGET = 8.0


class Crowd(Collector):
    """What one client process would show for `count` partitions that spend at different paces."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds
        self._started = time.time()

    def collect(self) -> Iterator[Metric]:
        labels = ("partition", "task")
        charges = CounterMetricFamily("fl_privacy_charges", "", labels=(*labels, "state"))
        refusals = CounterMetricFamily("fl_privacy_refusals", "", labels=(*labels, "reason"))
        policy = InfoMetricFamily("fl_privacy_policy", "", labels=labels)
        gauges: dict[str, GaugeMetricFamily] = {}
        part = min(1.0, (time.time() - self._started) / self._seconds)
        for index in range(self._count):
            pace = 1.1 * ((37 * index) % self._count + 1) / self._count  # 1 and more: its budget runs out
            wanted = round(pace * part * ROUNDS)
            rounds = min(ROUNDS, wanted)
            names = (f"site-{index:03}.example", ("digits", "fashion_mnist")[index % 2])
            values = {
                "fl_privacy_epsilon_spent": BUDGET * math.sqrt(rounds / ROUNDS),
                "fl_privacy_epsilon_reserved": 0.0,
                "fl_privacy_epsilon_budget": BUDGET,
                "fl_privacy_delta": 1e-5,
                "fl_privacy_rounds_remaining": ROUNDS - rounds,
                "fl_privacy_ledger_ok": int(index != 7),
                "fl_privacy_ledger_last_write_timestamp_seconds": time.time(),
                "fl_client_connected": int(index % 50 != 3),
                "fl_client_round": rounds,
                "fl_client_train_seconds": 1 + pace,
                "fl_client_samples_per_second": 5000 / (1 + pace),
            }
            for name, value in values.items():
                gauges.setdefault(name, GaugeMetricFamily(name, "", labels=labels)).add_metric(names, value)
            charges.add_metric((*names, "reserved"), rounds)
            policy.add_metric(names, {"epsilon": str(BUDGET), "noise_multiplier": "1.5", "sha256": "0"})
            for reason in Reason:
                refusals.add_metric((*names, reason), wanted - rounds if reason is Reason.BUDGET else 0)
        yield from (*gauges.values(), charges, refusals, policy)


@contextmanager
def many_partitions(folder: Path, *, count: int, seconds: float) -> Iterator[tuple[Prometheus, Window]]:
    """A Prometheus that has seen `count` partitions for `seconds`."""
    registry = CollectorRegistry()
    registry.register(Crowd(count, seconds))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    served = http.serve(make_wsgi_app(registry), address)
    started = time.time()
    try:
        with prometheus(folder / "prometheus", {"fedeps-client": [address]}) as source:
            time.sleep(max(0.0, started + seconds - time.time()))  # that they are seen for, not a readiness
            yield source, Window(start=started, end=time.time())
    finally:
        served.shutdown()
        served.server_close()
