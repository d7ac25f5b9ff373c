"""The stack on a CPU machine, with real faults: whatever is killed, torn down or forged, no epsilon is lost.

The tests build on each other's volumes, in the order of the file: one run with kills, then down and up, then intruders.
"""

import json
import re
from itertools import pairwise

import pytest

from client import ledger
from tests.containers.stack import ADDRESS, Stack, kill, wait_slowly
from tests.federation import wait_for

SETUP_SECONDS, ROUND_SECONDS, RUN_SECONDS = 240.0, 300.0, 900.0
PARTITIONS = [f"digits-{index}-of-3" for index in range(3)]


@pytest.fixture(scope="module")
def up(stack: Stack) -> Stack:
    stack.up()
    return stack


def wait_for_the_end(stack: Stack) -> None:
    """Of the run: every other end of the server is a crash, after which it is started again."""

    def ended() -> bool:
        (server,) = stack.containers("server")
        return server["State"]["Status"] == "exited" and server["State"]["ExitCode"] == 0

    wait_slowly(ended, "the run ends", RUN_SECONDS)


def in_prometheus(stack: Stack) -> dict[str, float]:
    """Where a container is gone, its last samples stay for five minutes: hence the maximum."""
    rows = stack.query("max by (partition) (fl_privacy_epsilon_spent)")
    return {row["metric"]["partition"]: float(row["value"][1]) for row in rows}


def assert_prometheus_shows_the_ledgers(stack: Stack) -> dict[str, float]:
    """Also that every partition is there. The next scrape may be seconds away."""
    spent = stack.spent()
    wait_slowly(lambda: in_prometheus(stack) == pytest.approx(spent, rel=1e-12), f"Prometheus shows {spent}", 120.0)
    assert list(spent) == PARTITIONS
    return spent


def assert_no_epsilon_ever_fell(stack: Stack) -> None:
    """In every sample that Prometheus has, whichever container it came from."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for row in stack.query("fl_privacy_epsilon_spent[3h]"):
        values = [(float(time), float(value)) for time, value in row["values"]]
        seen.setdefault(row["metric"]["partition"], []).extend(values)
    assert sorted(seen) == PARTITIONS
    for partition, samples in seen.items():
        assert len(samples) > 3
        for (_, before), (time, after) in pairwise(sorted(samples)):
            assert after >= before, f"{partition} fell from {before} to {after} at {time}"


def test_the_run_survives_the_kill_of_a_client_and_of_the_server(up: Stack) -> None:
    wait_for(lambda: len(up.rounds()) >= 2, "two rounds", SETUP_SECONDS)
    client = up.containers("client")[0]
    before = up.spent()
    kill(client)
    at = len(up.rounds())
    wait_for(lambda: len(up.rounds()) >= at + 3, "three more rounds", ROUND_SECONDS)
    (server,) = up.containers("server")
    kill(server)
    assert len(up.rounds()) < 60, "the run was over before the kill"
    wait_for_the_end(up)

    (again,) = up.inspect(client["Id"])
    assert again["RestartCount"] >= 1
    assert up.containers("server")[0]["RestartCount"] >= 1
    summary = json.loads((up.volume("runs") / "latest/summary.json").read_text())
    assert summary["rounds_completed"] == 60
    assert len(up.runs()) == 1
    spent = assert_prometheus_shows_the_ledgers(up)
    assert all(spent[name] > before[name] for name in PARTITIONS)
    assert_no_epsilon_ever_fell(up)
    told = {row["partition"]: row["epsilon_spent"] for row in summary["partitions"]}
    assert all(told[name] <= spent[name] + 1e-9 for name in PARTITIONS), "the server was told more than was charged"


def test_each_client_has_a_partition_of_its_own(up: Stack) -> None:
    held = [set(re.findall(r"(digits-\d-of-3): connected", up.logs(c["Id"]))) for c in up.containers("client")]
    assert sorted(held, key=min) == [{name} for name in PARTITIONS]


def test_containers_run_as_their_user_without_rights_on_a_root_that_cannot_be_written(up: Stack) -> None:
    for service in ("setup", "server", "client", "prometheus"):
        for container in up.containers(service):
            host = container["HostConfig"]
            assert host["ReadonlyRootfs"]
            assert host["CapDrop"] == ["ALL"]
            assert "no-new-privileges:true" in host["SecurityOpt"]
            assert not host["Privileged"]
            assert container["Config"]["User"] == ("65534:65534" if service == "prometheus" else "10001:10001")
    client = up.containers("client")[0]["Id"]
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"
    for path in ("/app/x", "/opt/fedeps/x", "/app/state/config/x"):
        with pytest.raises(RuntimeError, match="Read-only file system"):
            up.docker("exec", client, "python", "-c", write, path)
    up.docker("exec", client, "python", "-c", write, "/tmp/x")  # the control


def test_only_what_people_open_is_published_and_only_here(up: Stack) -> None:
    published = {
        (service, port, binding["HostIp"])
        for service in ("setup", "server", "client", "prometheus")
        for container in up.containers(service)
        for port, bindings in (container["HostConfig"]["PortBindings"] or {}).items()
        for binding in bindings
    }
    assert published == {("server", "9092/tcp", ADDRESS), ("prometheus", "9090/tcp", ADDRESS)}


def test_the_authoritys_key_is_in_no_container_that_runs(up: Stack) -> None:
    """And no program sees the private keys of the other."""
    sources = {
        service: {mount.get("Name", "").partition("_")[2] for c in up.containers(service) for mount in c["Mounts"]}
        for service in ("server", "client", "prometheus")
    }
    assert "server-key" in sources["server"]
    assert "client-keys" in sources["client"]
    assert all("authority" not in names for names in sources.values())
    assert "client-keys" not in sources["server"]
    assert "ledgers" not in sources["server"]
    assert "server-key" not in sources["client"]


def test_one_client_too_many_refuses(up: Stack) -> None:
    up.compose("up", "--detach", "--no-build", "--no-recreate", "--no-deps", "--scale", "client=4", "client")
    try:
        line = "partitions: all 3 are held by other clients (start fewer, or add partitions)"
        surplus = wait_slowly(
            lambda: [c for c in up.containers("client") if line in up.logs(c["Id"])], "a client that refuses", 120.0
        )
        assert len(surplus) == 1
    finally:
        up.compose("up", "--detach", "--no-build", "--no-recreate", "--no-deps", "--scale", "client=3", "client")


def test_a_second_client_on_a_ledger_trains_nothing(up: Stack) -> None:
    """One that does not even ask for a free partition: the ledger's lock holds between containers."""
    before = {name: path.read_bytes() for name, path in up.ledgers().items()}
    name = "fedeps-test-intruder"
    up.compose("run", "--detach", "--no-deps", "--name", name, "client", "--policy", "state/config/policy.yaml")
    try:
        for partition in PARTITIONS:
            line = f"{partition}/ledger.jsonl: another client holds it"
            wait_slowly(lambda line=line: line in up.logs(name), line, 120.0)
        code, text = wait_slowly(lambda: _answer(up, name, "/metrics"), "it answers", 120.0)
        assert code == 0
        assert re.findall(r"fl_privacy_ledger_ok{.*} (.+)", text) == ["0.0"] * 3
        assert up.ask(name, "127.0.0.1:9464", "/healthz")[0] == 1
        assert up.inspect(name)[0]["State"]["Running"]
    finally:
        up.docker("rm", "--force", name)
    assert {name: path.read_bytes() for name, path in up.ledgers().items()} == before


def test_budgets_go_on_after_down_and_up(up: Stack) -> None:
    before = up.spent()
    budgets = {name: ledger.read(path).ledger for name, path in up.ledgers().items()}
    up.compose("down")
    assert up.containers("client") == []
    assert up.spent() == before
    up.up()
    wait_for_the_end(up)
    after = assert_prometheus_shows_the_ledgers(up)
    assert all(after[name] > before[name] > 0 for name in PARTITIONS)
    assert {name: ledger.read(path).ledger for name, path in up.ledgers().items()} == budgets
    assert_no_epsilon_ever_fell(up)
    assert len(up.runs()) == 2


def test_a_forged_ledger_stops_its_partition_and_no_other(up: Stack) -> None:
    up.compose("down")
    name, *others = PARTITIONS
    path = up.ledgers()[name]
    content = path.read_text()
    forged = content.replace('"steps":8', '"steps":1', 1)
    assert forged != content
    with path.open("r+") as file:  # owner and mode stay
        file.write(forged)
        file.truncate()
    before, runs = up.spent(*others), up.runs()

    up.up()
    (run,) = wait_for(lambda: set(up.runs()) - set(runs), "another run", SETUP_SECONDS)
    wait_for(lambda: len(up.rounds(run)) >= 2, "two rounds of the others", SETUP_SECONDS)
    (client,) = [c for c in up.containers("client") if f"{name}: trains nothing" in up.logs(c["Id"])]
    assert client["State"]["Running"]
    assert client["RestartCount"] == 0
    code, text = up.ask(client["Id"], "127.0.0.1:9464", "/metrics")
    assert code == 0
    assert re.findall(r"fl_privacy_ledger_ok{.*} (.+)", text) == ["0.0"]
    assert "fl_privacy_epsilon_spent{" not in text
    assert up.ask(client["Id"], "127.0.0.1:9464", "/healthz")[0] == 1
    wait_slowly(lambda: up.inspect(client["Id"])[0]["State"]["Health"]["Status"] == "unhealthy", "unhealthy", 240.0)
    rows = up.query("min by (partition) (fl_privacy_ledger_ok)")
    assert {row["metric"]["partition"]: row["value"][1] for row in rows} == {name: "0", **dict.fromkeys(others, "1")}
    assert path.read_text() == forged
    after = up.spent(*others)
    assert all(after[other] > before[other] for other in others)
    assert {partition for line in up.rounds(run) for partition in line["trained"]} == set(others)


def _answer(stack: Stack, container: str, path: str) -> tuple[int, str] | None:
    code, text = stack.ask(container, "127.0.0.1:9464", path)
    return (code, text) if code == 0 else None
