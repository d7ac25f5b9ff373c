"""`/metrics` and `/healthz` of a client process. Holds no budget numbers of its own: each scrape reads the ledgers."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from client.ledger import Account, LedgerError, read
from client.member import Member
from client.policy import worst_round
from client.workers import Workers
from common import audit
from common.config import Policy, Privacy

LABELS = ("partition", "task")


class PrivacyCollector(Collector):
    """The `fl_privacy_*` metrics of each partition, from its ledger file, verified."""

    def __init__(self, policy: Policy, members: Sequence[Member]) -> None:
        self._policy = policy
        self._members = members
        self._read: dict[Path, tuple[tuple[int, ...], Account]] = {}  # unchanged files are not parsed again
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"fl_privacy_{name}", text, labels=LABELS)
            for name, text in (
                ("epsilon_spent", "Epsilon at the ledger's delta of all that was charged, reservations included."),
                ("epsilon_reserved", "The part of the spent epsilon whose training did not (yet) end in an update."),
                ("epsilon_budget", "The owner's epsilon budget."),
                ("delta", "The owner's delta."),
                ("next_round_epsilon", "What the next round would add to the spent epsilon, at most."),
                ("rounds_remaining", "Full rounds that the budget still covers."),
                ("ledger_ok", "1 while the ledger is verified and writable, else 0."),
                ("ledger_sequence", "Lines in the ledger."),
                ("ledger_last_write_timestamp_seconds", "When the ledger was last written, by the client's clock."),
            )
        }
        charges = CounterMetricFamily("fl_privacy_charges", "Charges by state.", labels=(*LABELS, "state"))
        refusals = CounterMetricFamily("fl_privacy_refusals", "Rounds refused.", labels=(*LABELS, "reason"))
        info = InfoMetricFamily("fl_privacy_ledger", "The ledger and the terms of its epsilon.", labels=LABELS)
        policy = InfoMetricFamily("fl_privacy_policy", "The owner's terms, and a digest of them.", labels=LABELS)
        round_ = worst_round(self._policy.privacy)
        for member in self._members:
            labels = (member.partition.name, self._policy.task)
            policy.add_metric(labels, _terms(self._policy.privacy))
            for reason, count in member.refusals.items():
                refusals.add_metric((*labels, str(reason)), count)
            try:
                account = self._account(self._policy.ledger_path(member.partition.name))
            except LedgerError:
                gauges["ledger_ok"].add_metric(labels, 0)
                continue
            spent = account.epsilon_spent
            values = {
                "epsilon_spent": spent,
                "epsilon_reserved": account.epsilon_reserved,
                "epsilon_budget": account.budget,
                "delta": account.delta,
                "next_round_epsilon": account.epsilon_with(round_) - spent,
                "rounds_remaining": account.rounds_remaining(round_),
                "ledger_ok": int(member.ledger_problem is None),
                "ledger_sequence": account.sequence,
                "ledger_last_write_timestamp_seconds": datetime.fromisoformat(account.last_time).timestamp(),
            }
            for name, value in values.items():
                gauges[name].add_metric(labels, value)
            charges.add_metric((*labels, "reserved"), len(account.messages))
            charges.add_metric((*labels, "committed"), account.commits)
            facts = {
                "accounting": account.mode, "adjacency": "add-or-remove-one", "ledger": account.ledger,
                "version": _version(),
            }  # fmt: skip
            info.add_metric(labels, facts)
        yield from (*gauges.values(), charges, refusals, info, policy)

    def _account(self, path: Path) -> Account:
        with self._lock:
            try:
                status = os.stat(path)
            except OSError as error:
                raise LedgerError(f"{path}: {error.strerror}") from error
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            known = self._read.get(path)
            if known is None or known[0] != stamp:
                known = self._read[path] = (stamp, read(path))
            return known[1]


class AuditCollector(Collector):
    """The last audit of this installation's terms, from its file: the same for each partition, absent without one."""

    def __init__(self, policy: Policy, members: Sequence[Member]) -> None:
        self._policy = policy
        self._members = members

    def collect(self) -> Iterator[Metric]:
        values: dict[str, float] = {}
        try:
            found = audit.read(self._policy.client.audit)
        except audit.AuditUnreadable:
            values["ok"] = 0
        else:
            if found is not None:
                mine = found.privacy == self._policy.privacy  # an audit of other terms vouches for none of these
                values["ok"] = int(found.ok and mine)
                values["timestamp_seconds"] = found.time.timestamp()
                if mine:
                    values["epsilon_lower_bound"] = found.epsilon_lower_bound
        for name, text in (
            ("ok", "1 if an audit of these terms found nothing against the client's claim, else 0."),
            ("timestamp_seconds", "When the audit was made."),
            ("epsilon_lower_bound", "Epsilon that an attack on this client has measured, at 95% confidence."),
        ):
            family = GaugeMetricFamily(f"fl_privacy_audit_{name}", text, labels=LABELS)
            for member in self._members:
                if name in values:
                    family.add_metric((member.partition.name, self._policy.task), values[name])
            yield family


class ClientCollector(Collector):
    """The `fl_client_*` metrics: what the process does right now."""

    def __init__(self, policy: Policy, members: Sequence[Member], workers: Workers) -> None:
        self._policy = policy
        self._members = members
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        gauges = (
            ("connected", "1 while the partition is in the server's fleet, else 0."),
            ("round", "The last round that the server asked for."),
            ("train_seconds", "Wall time of the last round's training."),
            ("samples_per_second", "Expected batch size times steps over the last round's training time."),
        )
        for name, text in gauges:
            family = GaugeMetricFamily(f"fl_client_{name}", text, labels=LABELS)
            for member in self._members:
                family.add_metric((member.partition.name, self._policy.task), float(getattr(member, name)))
            yield family
        memory = self._workers.gpu_memory_bytes()
        yield GaugeMetricFamily(
            "fl_client_gpu_memory_bytes", "GPU memory held by this process's workers.", value=memory
        )
        yield CounterMetricFamily(
            "fl_client_worker_deaths", "Workers that died in mid-round.", value=self._workers.deaths
        )


def application(policy: Policy, members: Sequence[Member], workers: Workers):  # type: ignore[no-untyped-def]
    """The WSGI application: `/metrics`; `/healthz`, 200 when every partition is connected with a sound ledger."""
    registry = CollectorRegistry()
    registry.register(PrivacyCollector(policy, members))
    registry.register(AuditCollector(policy, members))
    registry.register(ClientCollector(policy, members, workers))
    metrics = make_wsgi_app(registry)

    def route(environ: WSGIEnvironment, start_response: StartResponse):  # type: ignore[no-untyped-def]
        if environ["PATH_INFO"] != "/healthz":
            return metrics(environ, start_response)
        ready = all(member.connected and member.ledger_problem is None for member in members)
        start_response("200 OK" if ready else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if ready else b"not ready\n"]

    return route


def _terms(privacy: Privacy) -> dict[str, str]:
    """The terms as labels. The digest changes with any of them, so that a rule needs to know none by name."""
    terms = privacy.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()
    return {name: str(value) for name, value in terms.items()} | {"sha256": digest}


def _version() -> str:
    try:
        return version("fedeps")
    except PackageNotFoundError:  # run from a checkout
        return "0+checkout"
