"""What a Prometheus without the operator finds in the namespace: exactly the pods of server and clients."""

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.process import tethered
from k8s import ledgers, render
from k8s.clients import fleet
from k8s.template import ROOT, Manifest, build
from tests.federation import free_ports, wait_for
from tests.k8s import binaries
from tests.k8s.cluster import Cluster
from tests.k8s.combinations import overlay_with
from tests.k8s.nodes import Kubelet, node, nodes

PODS = "/api/v1/namespaces/fedeps/pods"
SCRAPE = ROOT / "k8s/components/monitoring/annotations/scrape.yml"
PATIENCE = 300.0

pytestmark = pytest.mark.timeout(900)

Targets = set[tuple[str, str, str]]  # job, instance, URL


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return build(overlay_with(("monitoring/annotations",), tmp_path_factory.mktemp("overlay")))


@pytest.fixture(scope="module")
def kubelet(cluster: Cluster) -> Iterator[Kubelet]:
    with nodes(cluster, [node("plain-0")]) as runs:
        yield runs


@pytest.fixture(scope="module")
def pods(cluster: Cluster, kubelet: Kubelet, template: list[Manifest]) -> Iterator[Cluster]:
    clients = fleet("3", ROOT / "k8s/overlays/local")
    cluster.kubectl("create", "namespace", "monitoring")
    cluster.kubectl("--namespace", "monitoring", "create", "serviceaccount", "prometheus")
    cluster.kubectl("apply", "--filename", "-", stdin=render.dump(render.manifests(template, clients)))
    # What is not to be scraped: a ledger's Job, and a pod elsewhere that asks for it.
    cluster.kubectl("apply", "--filename", "-", stdin=render.dump(ledgers.manifests(template, clients[:1])))
    stranger = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "stranger", "namespace": "default",
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9464"},
            "labels": {"app.kubernetes.io/component": "client"},
        },
        "spec": {"containers": [{"name": "shell", "image": "shell"}]},
    }  # fmt: skip
    cluster.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(stranger))
    wait_for(lambda: len(expected(cluster)) == 4, f"four pods run; {kubelet.errors}", PATIENCE)
    yield cluster
    cluster.kubectl("delete", "pod", "stranger")
    cluster.kubectl("delete", "namespace", "fedeps", "monitoring", f"--timeout={PATIENCE:.0f}s")
    cluster.kubectl("delete", "persistentvolumes", "--all")


@pytest.fixture(scope="module")
def prometheus(pods: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real one, with the file that a cluster's own would be given, as its ServiceAccount."""
    try:
        program, tool = binaries.get("prometheus"), binaries.get("promtool")
    except binaries.Missing as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("prometheus")
    token = pods.kubectl("--namespace", "monitoring", "create", "token", "prometheus").stdout
    (folder / "token").write_text(token)
    content = yaml.safe_load(SCRAPE.read_text())
    for job in content["scrape_configs"]:
        for discovery in job["kubernetes_sd_configs"]:
            # In a cluster all of this is the pod's own.
            discovery["api_server"] = f"https://127.0.0.1:{pods.port}"
            discovery["authorization"] = {"credentials_file": str(folder / "token")}
            discovery["tls_config"] = {"ca_file": str(pods.authority)}
    content["rule_files"] = [str(ROOT / "monitoring/prometheus/rules/*.yml")]
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(content))
    checked = subprocess.run([tool, "check", "config", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            tethered(
                [
                    str(program), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ]
            ),
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


def expected(cluster: Cluster) -> Targets:
    """From the pods themselves."""
    found: Targets = set()
    for pod in cluster.api.get(PODS)["items"]:
        labels, address = pod["metadata"]["labels"], pod["status"].get("podIP")
        component = labels["app.kubernetes.io/component"]
        if component != "ledger" and address and not pod["metadata"].get("deletionTimestamp"):
            port = {"client": 9464, "server": 9465}[component]
            instance = labels.get("app.kubernetes.io/instance", "server")
            found.add((f"fedeps-{component}", instance, f"http://{address}:{port}/metrics"))
    return found


def discovered(address: str) -> Targets:
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/targets?state=active", timeout=30) as response:
            active: list[dict[str, Any]] = json.load(response)["data"]["activeTargets"]
    except OSError:
        return set()
    assert len({json.dumps(target["labels"], sort_keys=True) for target in active}) == len(active)
    return {(target["labels"]["job"], target["labels"]["instance"], target["scrapeUrl"]) for target in active}


def test_the_targets_are_exactly_the_pods(pods: Cluster, prometheus: str) -> None:
    wait_for(lambda: discovered(prometheus) == expected(pods), "the targets", PATIENCE)
    found = discovered(prometheus)
    print(*sorted(found), sep="\n")
    assert {(job, instance) for job, instance, _ in found} == {
        ("fedeps-server", "server"), *(("fedeps-client", f"client-00{index}") for index in range(3)),
    }  # fmt: skip


def test_the_targets_follow_the_pods(pods: Cluster, prometheus: str) -> None:
    pods.kubectl("--namespace", "fedeps", "scale", "deployment", "client-001", "--replicas=0")
    wait_for(lambda: len(expected(pods)) == 3 and discovered(prometheus) == expected(pods), "one less", PATIENCE)
    pods.kubectl("--namespace", "fedeps", "scale", "deployment", "client-001", "--replicas=1")
    wait_for(lambda: len(expected(pods)) == 4 and discovered(prometheus) == expected(pods), "as before", PATIENCE)


def test_prometheus_may_list_pods_here_and_nothing_else(pods: Cluster) -> None:
    def may(*what: str) -> bool:
        user = "--as=system:serviceaccount:monitoring:prometheus"
        return pods.kubectl("auth", "can-i", *what, user, ok=(0, 1)).stdout.strip() == "yes"

    assert may("list", "pods", "--namespace=fedeps")
    assert not may("list", "secrets", "--namespace=fedeps")
    assert not may("list", "pods", "--namespace=default")


def test_pod_monitors_select_the_same_pods(template: list[Manifest], tmp_path: Path) -> None:
    """The operator's way and the annotations' way: the same labels, ports and names of jobs."""
    operator = build(overlay_with(("monitoring/operator",), tmp_path))
    pods = {
        each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"]
        for each in template
        if each["kind"] == "Deployment"
    }
    monitors = {each["metadata"]["name"]: each["spec"] for each in operator if each["kind"] == "PodMonitor"}
    assert set(monitors) == {f"fedeps-{component}" for component in pods}
    for component, pod in pods.items():
        spec = monitors[f"fedeps-{component}"]
        assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        (endpoint,) = spec["podMetricsEndpoints"]
        ports = {port["name"]: str(port["containerPort"]) for port in pod["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == pod["metadata"]["annotations"]["prometheus.io/port"]
        jobs = [each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"]
        assert jobs == [f"fedeps-{component}"]
