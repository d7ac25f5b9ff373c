"""Rules and dashboards: what promtool says, every metric one that a real process exports, every panel with data."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from client import ledger
from client.accounting import Release
from client.exporter import AuditCollector, ClientCollector, PrivacyCollector
from common import audit, pki
from common.config import Policy, Privacy, ServerSettings, parse
from common.messages import Reason
from server.exporter import ServerCollector
from server.history import History, write_status
from tests.dashboards.many_partitions import many_partitions
from tests.dashboards.panels import Panel, Window, answer, dashboards, expression, load, panels
from tests.dashboards.recorded_run import Recorded, recorded_run
from tests.federation import ROOT, metrics

MONITORING = ROOT / "monitoring"
RULES = sorted((MONITORING / "prometheus/rules").glob("*.yml"))
UNIT_TESTS = sorted((MONITORING / "prometheus/tests").glob("*.yml"))
PROMETHEUS_OWN = {"up", "ALERTS"}
NAME = re.compile(r"\b(?:fl_\w+|partition:[\w:]+|up|ALERTS)\b")
COUNTER_ONLY = re.compile(r"\b(?:rate|irate|increase|resets)\s*\(\s*(\S+?)[\s{\[]")

CONTENT: dict[str, Any] = {  # of a policy
    "privacy": {
        "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.5, "max_grad_norm": 0.5,
        "batch_size": 64, "records": 718, "max_steps_per_round": 12,
    },
    "partitions": [{"name": "a"}],
}  # fmt: skip


def promtool(*arguments: str | Path) -> str:
    program = shutil.which("promtool")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no promtool on PATH: apt-get install prometheus")
        pytest.skip("no promtool on PATH: Debian's package prometheus has it")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from (rule for rule in group["rules"] if "alert" in rule)


def rules() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def every_panel() -> list[Any]:
    return [
        pytest.param(panel, id=f"{path.stem}-{panel['title']}") for path in dashboards() for panel in panels(load(path))
    ]


def expressions() -> Iterator[str]:
    """All of the rules and all of the panels, with their variables filled in."""
    yield from (rule["expr"] for rule in rules())
    day = Window(start=0, end=86400)
    for path in dashboards():
        yield from (expression(t, day) for panel in panels(load(path)) for t in panel.get("targets", ()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The type of each metric that client and server export, by name, from their own collectors."""
    folder = tmp_path_factory.mktemp("exported")
    registry = CollectorRegistry()
    for collector in (*client_collectors(folder), server_collector(folder)):
        registry.register(collector)
    return {sample.name: family.type for family in registry.collect() for sample in family.samples}


def client_collectors(folder: Path) -> list[Any]:
    content = {**CONTENT, "client": {"state": str(folder / "clients"), "audit": str(folder / "audit.json")}}
    policy = parse(Policy, content, source="test")
    ledger.create(policy.ledger_path("a"), partition="a", privacy=policy.privacy)
    privacy = policy.privacy
    release = Release(noise_multiplier=1.5, sample_rate=privacy.sample_rate, steps=12)
    with_charge = ledger.Ledger.open(policy.ledger_path("a"), partition="a", privacy=privacy)
    with_charge.commit(with_charge.reserve("m", release))
    with_charge.close()
    member: Any = SimpleNamespace(
        partition=policy.partitions[0], refusals=dict.fromkeys(Reason, 0), ledger_problem=None,
        connected=True, round=1, train_seconds=1.0, samples_per_second=1.0,
    )  # fmt: skip
    workers: Any = SimpleNamespace(gpu_memory_bytes=lambda: 0, deaths=0)
    check = audit.Check.of(name="noise", observed=1.0, low=0.0, high=2.0)
    point = audit.Point(rounds=1, claimed=1.0, one_run=0.5, privacy_loss=0.5)
    trial = audit.Setting(name="terms", noise_multiplier=1.5, sample_rate=0.1, steps=1, points=[point], checks=[check])
    found = audit.Audit(
        time=datetime.now(UTC), ok=True, short=True, confidence=0.95, false_alarm=0.01, canaries=1, seconds=1.0,
        privacy=privacy, settings=[trial],
    )  # fmt: skip
    audit.write(found, policy.client.audit)
    members = [member]
    privacy_and_audit = (PrivacyCollector(policy, members), AuditCollector(policy, members))
    return [*privacy_and_audit, ClientCollector(policy, members, workers)]


def server_collector(folder: Path) -> ServerCollector:
    pki.create(folder / "pki", partitions=["a"])
    settings = ServerSettings(
        certificate=folder / "pki/server/server.crt", state=folder / "server", runs=folder / "runs"
    )
    settings.state.mkdir()
    line = {"round": 1, "seconds": 1.0, "trained": ["a"], "test_accuracy": 0.5, "test_loss": 1.0}
    History(settings.runs, "one", round=0).append(line)
    write_status(settings.state, {"run": "one", "round": 2, "rounds": 5, "connected": ["a"], "exhausted": []})
    return ServerCollector(settings)


# promtool


def test_promtool_accepts_rules_and_configuration() -> None:
    promtool("check", "rules", *RULES)
    promtool("check", "config", MONITORING / "prometheus/prometheus.yml")


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_promtool_runs_the_rules_own_tests(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("partition:fl_privacy_rounds_remaining:min < 5 >= 1", "partition:fl_privacy_rounds_remaining:min < 4 >= 1"),
        ("for: 2m", "for: 1m"),
        ("- partition:fl_privacy_epsilon_spent:min > 1e-6", "- partition:fl_privacy_epsilon_spent:max > 1e-6"),
        ("partition:fl_privacy_ledger_ok:min == 0", "partition:fl_privacy_ledger_ok:min == 2"),
    ],
)
def test_the_rules_own_tests_notice_a_changed_rule(tmp_path: Path, old: str, new: str) -> None:
    """The negative control."""
    shutil.copytree(MONITORING / "prometheus", tmp_path / "prometheus")
    changed = tmp_path / "prometheus/rules/privacy.yml"
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", tmp_path / "prometheus/tests/privacy.yml")


def test_every_query_of_a_panel_parses(tmp_path: Path) -> None:
    every = [{"record": "query:parses", "expr": each, "labels": {"n": str(n)}} for n, each in enumerate(expressions())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": every}]}))
    promtool("check", "rules", path)


# Alerts


@pytest.mark.parametrize("alert", list(alerts()), ids=lambda alert: alert["alert"])
def test_every_alert_says_how_bad_what_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert re.fullmatch(r"[1-9]\d*[smh]", alert["for"])
    assert alert["labels"]["severity"] in ("warning", "critical")
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
    section = re.split(rf"^### {alert['alert']}\n", (ROOT / "docs/runbook.md").read_text(), flags=re.M)[1]
    section = re.split(r"^#", section, flags=re.M)[0]
    assert all(f"**{part}.**" in section for part in ("Meaning", "Look", "Do"))


def test_every_alert_is_tested_on_both_sides_of_its_for() -> None:
    text = "".join(path.read_text() for path in UNIT_TESTS)
    for name in (alert["alert"] for alert in alerts()):
        states = re.findall(rf'alertname="{name}"[^}}]*alertstate="(\w+)"', text)
        assert {"pending", "firing"} <= set(states), name


def test_the_runbook_has_no_section_without_an_alert() -> None:
    titles = re.findall(r"^### (\w+)$", (ROOT / "docs/runbook.md").read_text(), flags=re.M)
    assert titles == [alert["alert"] for alert in sorted(alerts(), key=lambda a: a["alert"].startswith("Fleet"))]


# Names


def test_every_metric_in_rules_and_dashboards_is_exported(exported: dict[str, str]) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for each in expressions():
        names = set(NAME.findall(each))
        assert names, each
        assert names <= exported.keys() | recorded | PROMETHEUS_OWN, each


def test_counters_functions_are_used_on_counters_only(exported: dict[str, str]) -> None:
    """Epsilon is a gauge: rate() of it means nothing, and a sum over partitions even less."""
    seen = []
    for each in expressions():
        for name in COUNTER_ONLY.findall(each):
            assert exported[name] == "counter", each
            seen.append(name)
        assert not re.search(r"sum[^(]*(?:by \([^)]*\) )?\([^)]*epsilon", each), each
    assert seen


def test_the_terms_are_exported_and_any_change_of_them_shows() -> None:
    """PrivacyPolicyChanged counts the digests."""

    def terms(**changes: Any) -> dict[str, str]:
        privacy = {**CONTENT["privacy"], **changes}
        policy = parse(Policy, {**CONTENT, "privacy": privacy}, source="test")
        member: Any = SimpleNamespace(partition=policy.partitions[0], refusals={})
        families = {family.name: family for family in PrivacyCollector(policy, [member]).collect()}
        return families["fl_privacy_policy"].samples[0].labels

    before = terms()
    assert before.items() >= {"partition": "a", "task": "digits", "epsilon": "8.0", "noise_multiplier": "1.5"}.items()
    assert terms() == before
    changes: dict[str, Any] = {
        "epsilon": 9.0, "delta": 1e-6, "noise_multiplier": 1.4, "max_grad_norm": 0.6, "batch_size": 65,
        "records": 719, "max_steps_per_round": 13, "accounting": "adaptive",
    }  # fmt: skip
    assert set(changes) == set(Privacy.model_fields)
    digests = {terms(**{name: value})["sha256"] for name, value in changes.items()}
    assert len(digests | {before["sha256"]}) == len(changes) + 1


# Dashboards


def test_dashboards_have_stable_names() -> None:
    assert {path.stem: load(path)["uid"] for path in dashboards()} == {
        "fleet": "fedeps-fleet",
        "privacy-budget": "fedeps-privacy-budget",
    }


@pytest.mark.parametrize("path", dashboards(), ids=lambda path: path.stem)
def test_dashboards_have_one_data_source_and_choose_among_tasks_and_partitions(path: Path) -> None:
    dashboard = load(path)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "task", "partition"]
    assert variables["datasource"]["type"] == "datasource"
    assert all(variables[name]["multi"] and variables[name]["includeAll"] for name in ("task", "partition"))
    shown = [panel for panel in panels(dashboard) if panel["type"] != "text"]
    named = [*variables.values(), *shown, *(target for panel in shown for target in panel["targets"])]
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(each["datasource"] == source for each in named if each is not variables["datasource"])
    assert json.dumps(dashboard).count('"datasource": ') == len(named) - 1
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(set(ids)) == len(ids)
    squares = [
        (x, y)
        for panel in panels(dashboard)
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(squares)) == len(squares)  # no panel lies on another
    assert all(x < 24 for x, _ in squares)


@pytest.mark.parametrize("panel", every_panel())
def test_every_panel_says_what_it_shows_in_which_unit(panel: Panel) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    if panel["type"] != "text":
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]


def test_grafana_finds_what_the_dashboards_name() -> None:
    provisioning = MONITORING / "grafana/provisioning"
    source = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    provider = yaml.safe_load((provisioning / "dashboards/fedeps.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


# A real run under a real Prometheus


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    promtool("--version")
    with recorded_run(tmp_path_factory.mktemp("recorded")) as made:
        yield made


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_panel_has_data_of_a_real_run(recorded: Recorded) -> None:
    empty = [
        f"{path.stem}: {panel['title']}: {expression(target, recorded.window)}"
        for path in dashboards()
        for panel in panels(load(path))
        for target in panel.get("targets", ())
        if not answer(target, recorded.window, recorded.source)
    ]
    assert empty == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_prometheus_has_the_ledgers_figures(recorded: Recorded) -> None:
    source = recorded.source
    for name in recorded.run.partitions:
        seen = source.value(f'max_over_time(partition:fl_privacy_epsilon_spent:max{{partition="{name}"}}[1h])')
        assert seen is not None
        assert seen <= recorded.run.account(name).epsilon_spent  # a round may have been charged since
        assert source.value(f'resets(partition:fl_privacy_epsilon_spent:max{{partition="{name}"}}[1h])') == 0
    small = recorded.run.partitions[3]
    spent = recorded.run.account(small).epsilon_spent
    assert source.value(f'fl_privacy_epsilon_spent{{partition="{small}"}}') == spent
    assert source.value(f'fl_privacy_rounds_remaining{{partition="{small}"}}') == 0
    firing = {(a["metric"]["alertname"], a["metric"]["partition"]) for a in source.query(
        'ALERTS{alertstate="firing", partition!=""}', recorded.window.end
    )}  # fmt: skip
    strict = recorded.run.partitions[4]
    assert {("PrivacyNoRoundLeft", small), ("PrivacyBudgetExhausted", small), ("FleetRefusals", strict)} <= firing
    false = {name for name, _ in firing} & {
        "PrivacyEpsilonWentBackwards", "PrivacySpendWithoutRun", "PrivacyLedgerNotOk", "PrivacyAuditFailed",
        "PrivacyPolicyChanged", "FleetClientAbsent",
    }  # fmt: skip
    assert false == set()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_real_processes_export_what_rules_and_dashboards_name(recorded: Recorded) -> None:
    names = {name for port in (*recorded.ports, recorded.run.server_metrics) for name, _ in metrics(port)}
    wanted = {name for each in expressions() for name in NAME.findall(each) if name.startswith("fl_")}
    assert wanted <= names


@pytest.mark.long
@pytest.mark.timeout(300)
def test_charts_stay_readable_with_300_partitions(tmp_path: Path) -> None:
    promtool("--version")
    with many_partitions(tmp_path, count=300, seconds=40) as (source, window):
        for path in dashboards():
            for panel in panels(load(path)):
                series = sum(len(answer(target, window, source)) for target in panel.get("targets", ()))
                assert panel["type"] == "table" or series <= 25, panel["title"]
