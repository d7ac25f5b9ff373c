"""Three hundred clients on eight GPU nodes, placed by the real scheduler, and what changes to them touch."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import render
from k8s.clients import fleet, listing
from k8s.template import OVERLAYS, build
from tests.federation import ROOT, wait_for
from tests.k8s.cluster import Cluster
from tests.k8s.nodes import GPU_LABELS, Kubelet, node, nodes

GPU = OVERLAYS / "gpu-cluster"
NODES, SHARES, CLIENTS = 8, 40, 300
SKEW = 2  # of the overlay's topology rule
PATIENCE = 600.0
PRUNE = ("--prune", "--selector", "app.kubernetes.io/part-of=fedeps", "--prune-allowlist", "apps/v1/Deployment")

pytestmark = pytest.mark.timeout(1800)


def manifests(clients: str | Path = str(CLIENTS)) -> str:
    command = [sys.executable, "-m", "k8s", "render", "--overlay", "gpu-cluster", "--clients", str(clients)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kubelet(cluster: Cluster) -> Iterator[Kubelet]:
    made = [node(f"gpu-{index}", gpus=SHARES, labels=GPU_LABELS) for index in range(NODES)]
    with nodes(cluster, [*made, node("cpu-0")]) as runs:
        yield runs


@pytest.fixture(scope="module")
def applied(cluster: Cluster, kubelet: Kubelet) -> Iterator[str]:
    """The whole fleet, running."""
    cluster.kubectl("create", "namespace", "gpu-operator")
    text = manifests()
    started = time.perf_counter()
    cluster.kubectl("apply", "--filename", "-", stdin=text)
    print(f"applied {CLIENTS} clients in {time.perf_counter() - started:.1f} s")
    wait_for(lambda: running(cluster) == names(CLIENTS) | {"server"}, f"{CLIENTS} pods run; {kubelet.errors}", PATIENCE)
    print(f"all of them running {time.perf_counter() - started:.1f} s after the start")
    yield text
    for name in ("fedeps", "gpu-operator"):
        cluster.kubectl("delete", "namespace", name, "--timeout", f"{PATIENCE:.0f}s")
    cluster.kubectl("delete", "persistentvolumes", "--all")


def names(count: int) -> set[str]:
    return {f"client-{index:03}" for index in range(count)}


def pods(cluster: Cluster) -> list[dict[str, Any]]:
    return cluster.api.items("/api/v1/namespaces/fedeps/pods")


def name_of(pod: dict[str, Any]) -> str:
    labels = pod["metadata"]["labels"]
    return labels.get("app.kubernetes.io/instance") or labels["app.kubernetes.io/component"]


def running(cluster: Cluster) -> set[str]:
    """Who runs; nobody while any pod is on its way in or out, or there twice."""
    found = pods(cluster)
    settled = all(p["status"]["phase"] == "Running" and not p["metadata"].get("deletionTimestamp") for p in found)
    who = [name_of(pod) for pod in found]
    return set(who) if settled and len(set(who)) == len(who) else set()


def identities(cluster: Cluster) -> dict[str, str]:
    return {name_of(pod): pod["metadata"]["uid"] for pod in pods(cluster)}


def claims(cluster: Cluster) -> dict[str, tuple[str, str]]:
    """The claim's own identity and its volume's, by client."""
    found = cluster.api.items("/api/v1/namespaces/fedeps/persistentvolumeclaims")
    return {
        claim["metadata"]["name"]: (claim["metadata"]["uid"], claim["spec"]["volumeName"])
        for claim in found
        if claim["metadata"]["name"].startswith("client-")
    }


def changes(before: str, after: str) -> str:
    """What of `after` is not in `before`: applying the rest is known to do nothing, and takes a minute."""
    known = set(before.split("\n---\n"))
    return "\n---\n".join(each for each in after.split("\n---\n") if each not in known)


def replaced(cluster: Cluster, kubelet: Kubelet, before: str, after: str) -> set[str]:
    """Whose pods are others once `after` is applied over `before` and all is quiet again."""
    pods_before = identities(cluster)
    cluster.kubectl("apply", "--filename", "-", stdin=changes(before, after))
    wait_for(lambda: rolled_out(cluster), f"the roll-out; {kubelet.errors}", PATIENCE)
    wait_for(lambda: running(cluster) == names(CLIENTS) | {"server"}, f"pods run again; {kubelet.errors}", PATIENCE)
    pods_after = identities(cluster)
    return {name for name in pods_before.keys() | pods_after.keys() if pods_before.get(name) != pods_after.get(name)}


def rolled_out(cluster: Cluster) -> bool:
    for each in cluster.api.get("/apis/apps/v1/namespaces/fedeps/deployments")["items"]:
        status = each["status"]
        if status.get("observedGeneration") != each["metadata"]["generation"]:
            return False
        if status.get("updatedReplicas", 0) != each["spec"]["replicas"] or status.get("unavailableReplicas"):
            return False
    return True


def test_every_client_gets_its_share_and_the_nodes_are_even(cluster: Cluster, applied: str) -> None:  # noqa: ARG001
    clients = [pod for pod in pods(cluster) if name_of(pod) != "server"]
    per_node = Counter(pod["spec"]["nodeName"] for pod in clients)
    print(dict(per_node))
    assert sum(per_node.values()) == CLIENTS
    assert set(per_node) == {f"gpu-{index}" for index in range(NODES)}
    assert max(per_node.values()) - min(per_node.values()) <= SKEW
    assert max(per_node.values()) <= SHARES
    assert all(
        pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1" and pod["spec"]["priority"] == 1000
        for pod in clients
    )
    volumes = [volume for _, volume in claims(cluster).values()]
    assert len(set(volumes)) == CLIENTS


def test_the_namespace_enforces_restricted_pod_security(cluster: Cluster, applied: str) -> None:  # noqa: ARG001
    labels = cluster.get("namespace", "fedeps")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "careless", "namespace": "fedeps"},
        "spec": {"containers": [{"name": "shell", "image": "shell"}]},
    }  # fmt: skip
    refused = cluster.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(pod), ok=(1,))
    assert 'violates PodSecurity "restricted:latest"' in refused.stderr


def test_nothing_differs_after_apply(cluster: Cluster, applied: str) -> None:
    assert cluster.kubectl("diff", "--filename", "-", stdin=applied).stdout == ""
    again = cluster.kubectl("apply", "--filename", "-", stdin=manifests()).stdout.splitlines()
    # kubectl always sends a disruption budget's selector, and says so; that nothing comes of it shows its generation.
    quiet = ("poddisruptionbudget.policy/server configured",)
    assert [line for line in again if not line.endswith(" unchanged") and line not in quiet] == []
    kept = cluster.get("poddisruptionbudget", "server", "--namespace", "fedeps")
    assert kept["metadata"]["generation"] == 1
    other = changes(applied, applied.replace("cpu: 500m", "cpu: 501m"))
    assert "cpu: 501m" in cluster.kubectl("diff", "--filename", "-", stdin=other, ok=(1,)).stdout


def test_what_restarts_is_whom_it_concerns(cluster: Cluster, applied: str, kubelet: Kubelet, tmp_path: Path) -> None:
    template = build(GPU)

    def with_policy(**policy: Any) -> str:
        content = yaml.safe_load(listing(fleet(str(CLIENTS), GPU)))
        content["clients"][17]["policy"] = policy
        path = tmp_path / "fleet.yaml"
        path.write_text(yaml.safe_dump(content))
        return render.dump(render.manifests(template, fleet(str(path), GPU)))

    rounds = applied.replace("rounds: 50", "rounds: 60")
    checksum = next(line for line in applied.splitlines() if "checksum/federation" in line)
    rounds = rounds.replace(checksum, checksum.rpartition(" ")[0] + " another")
    epsilon = with_policy(privacy={"epsilon": 3.0})
    budget = applied.replace("unhealthyPodEvictionPolicy: AlwaysAllow", "unhealthyPodEvictionPolicy: IfHealthyBudget")
    for other, expected in ((rounds, {"server"}), (epsilon, {"client-017"}), (budget, set())):
        assert changes(applied, other)
        assert replaced(cluster, kubelet, applied, other) == expected
        assert replaced(cluster, kubelet, other, applied) == expected


def test_a_client_is_paused_and_comes_back_to_its_own_claim(
    cluster: Cluster, applied: str, kubelet: Kubelet, tmp_path: Path
) -> None:
    content = yaml.safe_load(listing(fleet(str(CLIENTS), GPU)))
    content["clients"][17]["paused"] = True
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(content))
    before, claimed = identities(cluster), claims(cluster)
    paused = manifests(path)
    cluster.kubectl("apply", "--filename", "-", stdin=changes(applied, paused))
    others = (names(CLIENTS) | {"server"}) - {"client-017"}
    wait_for(lambda: running(cluster) == others, f"client-017 is gone; {kubelet.errors}", PATIENCE)
    assert identities(cluster) == {name: uid for name, uid in before.items() if name != "client-017"}
    assert replaced(cluster, kubelet, paused, applied) == {"client-017"}
    assert claims(cluster) == claimed


def test_fewer_and_more_clients_come_and_go_by_name_and_their_claims_stay(
    cluster: Cluster, applied: str, kubelet: Kubelet
) -> None:
    before, claimed = identities(cluster), claims(cluster)
    cluster.kubectl("apply", "--filename", "-", *PRUNE, stdin=manifests("120"))
    wait_for(lambda: running(cluster) == names(120) | {"server"}, f"120 pods run; {kubelet.errors}", PATIENCE)
    kept = identities(cluster)
    assert kept == {name: before[name] for name in names(120) | {"server"}}
    assert claims(cluster) == claimed
    deployments = cluster.get("deployments", "--namespace", "fedeps")["items"]
    assert {each["metadata"]["name"] for each in deployments} == names(120) | {"server"}

    cluster.kubectl("apply", "--filename", "-", stdin=changes(manifests("120"), applied))
    wait_for(lambda: running(cluster) == names(CLIENTS) | {"server"}, f"all pods run; {kubelet.errors}", PATIENCE)
    after = identities(cluster)
    assert {name: after[name] for name in kept} == kept
    assert claims(cluster) == claimed, "each came back to the volume that holds its ledger"
    per_node = Counter(pod["spec"]["nodeName"] for pod in pods(cluster) if name_of(pod) != "server")
    assert max(per_node.values()) - min(per_node.values()) <= SKEW
