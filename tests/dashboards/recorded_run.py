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
from tests.federation import Federation, federation, free_ports, wait_for

CLIENTS = 5
OWNERS: dict[str, tuple[slice, dict[str, Any]]] = {  # client processes: their partitions, and what is special in them
    "plain": (slice(0, 3), {}),
    "small-budget": (slice(3, 4), {"epsilon": 1.0}),  # spent in the first run, so that the second meets a refusal
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
    terms = {"noise_multiplier": 8.0, "epsilon": 4.0}
    _audit(folder / "audit", terms)  # a minute's work: before ports are chosen, which others could take meanwhile
    ports = free_ports(len(OWNERS))
    with federation(folder / "run", clients=CLIENTS, privacy=terms, rounds=40, fit_clients=4) as run:
        targets = {
            "fedeps-server": [f"127.0.0.1:{run.server_metrics}"],
            "fedeps-client": [f"127.0.0.1:{port}" for port in ports],
        }
        server = run.start_server()
        with prometheus(folder / "prometheus", targets) as source:
            started = time.time()
            for port, (name, owner) in zip(ports, OWNERS.items(), strict=True):
                policy = _policy(run, name, owner, audit=folder / "audit" / f"{name}.json", port=port)
                run.start(name, "-m", "client", "--policy", policy)
            assert server.wait(timeout=600) == 0, run.log("server")
            run.federation_content["rounds"] = 1000  # more than the budgets cover
            run.configure()
            run.start_server()
            firing = 'ALERTS{alertname="PrivacyBudgetExhausted", alertstate="firing"}'
            wait_for(lambda: source.value(f"count({firing})"), "the alert about a refused round", 300)
            yield Recorded(run=run, ports=ports, source=source, window=Window(start=started, end=time.time()))


def _audit(folder: Path, terms: dict[str, Any]) -> None:
    """The first owner has audited its client, the others have not."""
    name, owner = next(iter(OWNERS.items()))
    with federation(folder / "run", clients=CLIENTS, privacy=terms) as run:
        policy = _policy(run, name, owner, audit=folder / f"{name}.json", port=free_ports(1)[0])
        assert run.start("audit", "-m", "audit", "--short", "--policy", policy).wait(timeout=400) == 0, run.log("audit")


def _policy(run: Federation, name: str, owner: tuple[slice, dict[str, Any]], *, audit: Path, port: int) -> str:
    which, special = owner
    policy = copy.deepcopy(run.policy_content)
    policy["privacy"] |= special
    policy["client"] |= {"metrics_address": f"127.0.0.1:{port}", "audit": str(audit)}
    policy["partitions"] = policy["partitions"][which]
    (run.folder / f"{name}.yaml").write_text(yaml.safe_dump(policy))
    return f"{name}.yaml"
