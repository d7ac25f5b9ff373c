"""A federation from the manifests: the pods' own commands, run as they say, in an administrator's order.

Three clients and a server of the overlay `local` on a kubelet that runs processes. What follows the run is what must
hold after it: a finished run stays finished, one budget has one pod, and a lost ledger is not made again.
"""

import copy
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from client import ledger
from common import pki
from k8s.template import OVERLAYS
from tests.federation import ROOT, wait_for
from tests.k8s import processes
from tests.k8s.api import Object
from tests.k8s.cluster import Cluster
from tests.k8s.nodes import node, nodes
from tests.k8s.processes import ProcessKubelet

CLIENTS = [f"client-{index:03}" for index in range(3)]
PODS = "/api/v1/namespaces/fedeps/pods"
PATIENCE = 600.0

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(processes.refusal() is not None, reason=str(processes.refusal())),
]


@pytest.fixture(scope="module")
def kubelet(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessKubelet]:
    folder = tmp_path_factory.mktemp("kubelet")
    for path in (folder, *folder.parents):
        if path.stat().st_uid == 0 and path != Path("/") and not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)  # pods are other users
    with nodes(cluster, [node("local-0")], lambda api, made: ProcessKubelet(api, made, folder=folder)) as runs:
        assert isinstance(runs, ProcessKubelet)
        yield runs


@pytest.fixture(scope="module")
def run(cluster: Cluster, kubelet: ProcessKubelet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ledgers, then keys, then the fleet, until the run has ended."""
    folder = tmp_path_factory.mktemp("pki")
    cluster.kubectl("apply", "--kustomize", str(OVERLAYS / "local/ledgers"))
    cluster.kubectl(
        "--namespace", "fedeps", "wait", "--for=condition=complete", "job", "--all", f"--timeout={PATIENCE:.0f}s"
    )
    assert not [path for path in kubelet.folder.rglob("key") if path.is_file()], "no key yet"
    partitions = generator("partitions").split()
    assert partitions == CLIENTS
    pki.create(folder, partitions=partitions)
    cluster.kubectl("apply", "--server-side", "--filename", "-", stdin=generator("keys", "--pki", str(folder)))
    cluster.kubectl("apply", "--kustomize", str(OVERLAYS / "local"))
    wait_for(lambda: "the run has ended" in log(kubelet, "server"), f"the end of the run; {kubelet.errors}", PATIENCE)
    yield cluster
    cluster.kubectl("delete", "namespace", "fedeps", f"--timeout={PATIENCE:.0f}s")
    cluster.kubectl("delete", "persistentvolumes", "--all")


def generator(*arguments: str) -> str:
    command = [sys.executable, "-m", "k8s", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def log(kubelet: ProcessKubelet, prefix: str) -> str:
    """All logs of the pods whose names begin so."""
    return "".join(kubelet.log(name) for name in list(kubelet.logs) if name.startswith(prefix))


def pod(cluster: Cluster, name: str) -> Object:
    """The one pod of a Deployment that is not on its way out."""
    label = f"app.kubernetes.io/instance={name}" if name != "server" else "app.kubernetes.io/component=server"
    found = [
        each
        for each in cluster.api.get(f"{PODS}?labelSelector={label}")["items"]
        if not each["metadata"].get("deletionTimestamp") and not each["metadata"]["name"].startswith("ledger-")
    ]
    return found[0] if len(found) == 1 and found[0]["status"].get("podIP") else {}


def metrics(address: str, port: int) -> dict[tuple[str, str], float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    return {
        (sample.name, sample.labels.get("partition", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def volume(kubelet: ProcessKubelet, claim: str) -> Path:
    return Path(kubelet.volume_folder("fedeps", claim))


def ledger_of(kubelet: ProcessKubelet, client: str) -> Path:
    return volume(kubelet, client) / "ledgers" / client / "ledger.jsonl"


def test_the_run_ends_and_every_budget_is_in_its_pods_metrics(run: Cluster, kubelet: ProcessKubelet) -> None:
    summary = json.loads((volume(kubelet, "server") / "runs/latest/summary.json").read_text())
    assert summary["rounds_completed"] == 3
    told = {each["partition"]: each for each in summary["partitions"]}
    for name in CLIENTS:
        found = metrics(pod(run, name)["status"]["podIP"], 9464)
        spent, budget = found["fl_privacy_epsilon_spent", name], found["fl_privacy_epsilon_budget", name]
        account = ledger.read(ledger_of(kubelet, name))
        print(f"{name} has spent epsilon {spent:.4f} of {budget:g}")
        assert 0 < spent < budget == 8.0
        assert spent == pytest.approx(account.epsilon_spent, rel=1e-12)
        assert told[name]["epsilon_spent"] == pytest.approx(spent, rel=1e-12)
        assert account.commits == told[name]["rounds_trained"] == 3
        assert found["fl_privacy_ledger_ok", name] == 1
    server = metrics(pod(run, "server")["status"]["podIP"], 9465)
    assert server["fl_server_rounds_total", ""] == 3


def test_the_pods_were_what_the_manifests_say(run: Cluster, kubelet: ProcessKubelet) -> None:
    for name in CLIENTS:
        path = ledger_of(kubelet, name)
        assert (path.stat().st_uid, path.stat().st_gid) == (10001, 10001)
    running = [each for each in list(kubelet.containers.values()) if each.process and each.process.poll() is None]
    assert len(running) == 4
    for container in running:
        assert container.process is not None
        status = Path(f"/proc/{processes.children(container.process.pid)[0]}/status").read_text()
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert facts["Uid"].split() == ["10001"] * 4
        assert facts["CapBnd"] == facts["CapEff"] == "0" * 16
        assert facts["NoNewPrivs"] == "1"
        assert container.restarts == 0, log(kubelet, container.pod["metadata"]["name"])
    assert {p["metadata"]["name"] for p in run.api.get(PODS)["items"] if p["status"]["phase"] == "Failed"} == set()


def test_readiness_followed_the_run(run: Cluster, kubelet: ProcessKubelet) -> None:
    """Ready while the Fleet listened; the server that stays for its metrics alone is not, and clients wait for it."""
    for name in CLIENTS:
        assert ": connected" in log(kubelet, name)
    wait_for(
        lambda: not any(condition(pod(run, name), "Ready") for name in ["server", *CLIENTS]), "no pod is ready", 300
    )


def condition(found: Object, kind: str) -> bool:
    conditions = found.get("status", {}).get("conditions", [])
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def test_a_finished_run_is_not_run_once_more(run: Cluster, kubelet: ProcessKubelet) -> None:
    """A Deployment starts its pod again for ever; budgets must not pay for that."""
    before = {name: ledger.read(ledger_of(kubelet, name)).epsilon_spent for name in CLIENTS}
    old = pod(run, "server")["metadata"]["name"]
    run.kubectl("--namespace", "fedeps", "delete", "pod", old)
    wait_for(lambda: pod(run, "server").get("metadata", {}).get("name", old) != old, "another server", PATIENCE)
    new = pod(run, "server")["metadata"]["name"]
    wait_for(lambda: new in kubelet.logs and "the run has ended" in kubelet.log(new), "it stays", PATIENCE)
    assert "registered" not in kubelet.log(new)
    assert {name: ledger.read(ledger_of(kubelet, name)).epsilon_spent for name in CLIENTS} == before


def test_a_second_pod_on_a_claim_is_not_placed(run: Cluster, kubelet: ProcessKubelet) -> None:  # noqa: ARG001
    """ReadWriteOncePod, which the scheduler holds to."""
    twin = twin_of(pod(run, "client-001"), "placed")
    run.api.create(PODS, twin)

    def reason() -> str:
        found = run.api.get(f"{PODS}/placed")["status"].get("conditions", [])
        return next((each.get("message", "") for each in found if each["type"] == "PodScheduled"), "")

    wait_for(lambda: "ReadWriteOncePod" in reason(), "the scheduler refuses", PATIENCE)
    run.api.delete(f"{PODS}/placed", grace=0)


def test_a_second_pod_forced_onto_a_claim_trains_nothing(run: Cluster, kubelet: ProcessKubelet) -> None:
    """Where nobody holds to ReadWriteOncePod the ledger does: it has one lock."""
    before = ledger_of(kubelet, "client-001").read_bytes()
    twin = twin_of(pod(run, "client-001"), "forced", node="local-0")
    run.api.create(PODS, twin)
    wait_for(lambda: "forced" in kubelet.logs and "another client holds it" in kubelet.log("forced"), "no", PATIENCE)
    address = wait_for(lambda: run.api.get(f"{PODS}/forced")["status"].get("podIP"), "an address", PATIENCE)
    found = wait_for(lambda: reachable(address), "metrics", PATIENCE)
    assert found["fl_privacy_ledger_ok", "client-001"] == 0
    assert ledger_of(kubelet, "client-001").read_bytes() == before
    run.api.delete(f"{PODS}/forced")
    wait_for(lambda: "forced" not in names(run), "it is gone", PATIENCE)


def test_a_writer_that_was_overtaken_stops(run: Cluster, kubelet: ProcessKubelet) -> None:
    """A file system without locks: the second pod raises the epoch, and the first finds that somebody else wrote."""
    name = "client-002"
    (volume(kubelet, name) / "sitecustomize.py").write_text("import fcntl\nfcntl.flock = lambda *_: None\n")
    before = ledger.read(ledger_of(kubelet, name))
    twin = twin_of(pod(run, name), "lockless", node="local-0")
    twin["spec"]["containers"][0]["env"] = [{"name": "PYTHONPATH", "value": "/var/lib/fedeps:/app"}]
    run.api.create(PODS, twin)
    wait_for(lambda: ledger.read(ledger_of(kubelet, name)).epoch == before.epoch + 1, "a newer epoch", PATIENCE)
    run.api.delete(f"{PODS}/lockless")
    wait_for(lambda: "lockless" not in names(run), "it is gone", PATIENCE)

    # The first pod has the ledger open since before that, and is now asked to train.
    start_run(run, (OVERLAYS / "local/federation.yaml").read_text().replace("rounds: 3", "rounds: 1"))
    wait_for(lambda: "changed by another writer" in log(kubelet, f"{name}-"), "it found out", PATIENCE)
    wait_for(lambda: log(kubelet, "server-").count("the run has ended") >= 3, "the others' round", PATIENCE)
    assert ledger.read(ledger_of(kubelet, name)).epsilon_spent == before.epsilon_spent
    assert ledger.read(ledger_of(kubelet, "client-001")).commits == 4


def test_a_lost_ledger_is_not_made_again(run: Cluster, kubelet: ProcessKubelet) -> None:
    """The key is there, so the partition was used: the Job refuses, and so does the client."""
    name = "client-000"
    run.kubectl("--namespace", "fedeps", "scale", "deployment", name, "--replicas=0")
    wait_for(lambda: not [p for p in names(run) if p.startswith(name)], f"{name} is gone", PATIENCE)
    lost = ledger_of(kubelet, name)
    content = lost.read_bytes()
    lost.unlink()
    run.kubectl("--namespace", "fedeps", "delete", "job", f"ledger-{name}", f"--timeout={PATIENCE:.0f}s")
    run.kubectl("apply", "--filename", "-", stdin=generator("ledgers", "--only", name))
    run.kubectl(
        "--namespace", "fedeps", "wait", "--for=condition=failed", f"job/ledger-{name}", f"--timeout={PATIENCE:.0f}s"
    )
    assert "has a key and may have spent budget" in log(kubelet, f"ledger-{name}")
    assert not lost.exists()

    run.kubectl("--namespace", "fedeps", "scale", "deployment", name, "--replicas=1")
    wait_for(lambda: f"{lost.name}: missing" in log(kubelet, f"{name}-"), "the client refuses", PATIENCE)
    assert not lost.exists()
    lost.write_bytes(content)


def names(cluster: Cluster) -> set[str]:
    return {each["metadata"]["name"] for each in cluster.api.get(PODS)["items"]}


def reachable(address: str) -> dict[tuple[str, str], float]:
    try:
        return metrics(address, 9464)
    except OSError:
        return {}


def start_run(cluster: Cluster, federation: str) -> None:
    """As a new render with another federation.yaml would."""
    found = cluster.get("--namespace", "fedeps", "configmap", "server")
    metadata = {key: found["metadata"][key] for key in ("name", "namespace", "labels")}
    content = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"federation.yaml": federation},
    }  # fmt: skip
    cluster.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(content))
    cluster.kubectl("--namespace", "fedeps", "rollout", "restart", "deployment/server")


def twin_of(original: Object, name: str, *, node: str | None = None) -> Object:
    """A bare pod like `original`; with `node` it goes past the scheduler."""
    spec = copy.deepcopy(original["spec"])
    for key in ("nodeName", "tolerations", "preemptionPolicy", "priority"):
        spec.pop(key, None)
    if node:
        spec["nodeName"] = node
    metadata = {"name": name, "namespace": "fedeps", "labels": {"app.kubernetes.io/name": "twin"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
