"""A federation worth looking at, scraped by a real Prometheus: several rounds, two runs, a spent budget, refusals."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.dashboards.panels import Window
from tests.dashboards.prometheus import Prometheus, prometheus
from tests.federation import Federation, federation, free_ports, metrics, wait_for

CLIENTS = 5
OWNERS: dict[str, tuple[slice, dict[str, Any]]] = {  # client processes: their partitions, and what is special in them
    "plain": (slice(0, 3), {}),
    "small-budget": (slice(3, 4), {"epsilon": 1.5}),
    "strict": (slice(4, 5), {"max_steps_per_round": 2}),  # fewer than the server asks for
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A run that goes on, and the Prometheus that has seen it and the one before."""

    run: Federation
    ports: list[int]  # of the clients' metrics
    source: Prometheus
    window: Window


@contextmanager
def recorded_run(folder: Path) -> Iterator[Recorded]:
    """A run that is completed, and a second one on the same ledgers that is under way."""
    ports = free_ports(len(OWNERS))
    terms = {"noise_multiplier": 8.0, "epsilon": 4.0}
    with federation(folder, clients=CLIENTS, privacy=terms, rounds=40, fit_clients=4) as run:
        targets = {
            "fedeps-server": [f"127.0.0.1:{run.server_metrics}"],
            "fedeps-client": [f"127.0.0.1:{port}" for port in ports],
        }
        with prometheus(folder / "prometheus", targets) as source:
            _audit(run, ports[0])
            started = time.time()
            for port, (name, owner) in zip(ports, OWNERS.items(), strict=True):
                run.start(name, "-m", "client", "--policy", _policy(run, name, owner, port))
            for port in ports:
                wait_for(lambda port=port: _answers(port), "the client's metrics", 180)
            server = run.start_server()
            assert server.wait(timeout=600) == 0, run.log("server")
            run.federation_content["rounds"] = 1000  # more than the budgets cover
            run.configure()
            run.start_server()
            firing = 'ALERTS{alertname="PrivacyBudgetExhausted", alertstate="firing"}'
            wait_for(lambda: source.value(f"count({firing})"), "the alert about a refused round", 300)
            yield Recorded(run=run, ports=ports, source=source, window=Window(start=started, end=time.time()))


def _audit(run: Federation, port: int) -> None:
    """The first owner has audited its client, the others have not."""
    path = _policy(run, *next(iter(OWNERS.items())), port)
    assert run.start("audit", "-m", "audit", "--short", "--policy", path).wait(timeout=300) == 0, run.log("audit")


def _policy(run: Federation, name: str, owner: tuple[slice, dict[str, Any]], port: int) -> str:
    which, special = owner
    policy = copy.deepcopy(run.policy_content)
    policy["privacy"] |= special
    policy["client"]["metrics_address"] = f"127.0.0.1:{port}"
    policy["client"]["audit"] = f"state/audit/{name}.json"
    policy["partitions"] = policy["partitions"][which]
    (run.folder / f"{name}.yaml").write_text(yaml.safe_dump(policy))
    return f"{name}.yaml"


def _answers(port: int) -> bool:
    try:
        return bool(metrics(port))
    except OSError:
        return False
