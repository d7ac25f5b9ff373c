"""The API server's own opinion of every object of every overlay and of every set of components."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common import pki
from k8s import render
from k8s.clients import fleet
from k8s.template import OVERLAYS, Manifest
from tests.federation import wait_for
from tests.k8s import binaries, crds
from tests.k8s.cluster import Cluster
from tests.k8s.combinations import component_sets, everything, overlay_with

STRICT = ("apply", "--dry-run=server", "--validate=strict", "--filename", "-")

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def ready(cluster: Cluster) -> Iterator[Cluster]:
    """The namespaces and the custom resources that a dry run needs to be there."""
    try:
        for path in crds.files():
            cluster.kubectl("apply", "--server-side", "--filename", str(path))
    except binaries.Missing as missing:
        pytest.skip(str(missing))
    for path in ("/apis/cert-manager.io/v1/issuers", "/apis/monitoring.coreos.com/v1/podmonitors"):
        wait_for(lambda path=path: cluster.kubectl("get", "--raw", path, ok=(0, 1)).returncode == 0, path, 120)
    for name in ("fedeps", "gpu-operator"):
        cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", "fedeps", "pod-security.kubernetes.io/warn=restricted")
    yield cluster
    for name in ("fedeps", "gpu-operator"):
        cluster.kubectl("delete", "namespace", name, "--timeout", "300s")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Every different object that any overlay or combination renders, once."""
    folder = tmp_path_factory.mktemp("combinations")
    pki.create(folder / "pki", partitions=[f"client-{index:03}" for index in range(2)])
    overlays = [OVERLAYS / "local", OVERLAYS / "gpu-cluster"]
    combined = [overlay_with(components, folder) for components in component_sets()]
    assert len(combined) == 120
    different: dict[str, Manifest] = {}
    for overlay in [*overlays, *combined]:
        for manifest in everything(overlay, fleet("2", overlay), folder / "pki"):
            different[json.dumps(manifest, sort_keys=True)] = manifest
    return list(different.values())


def test_the_server_takes_every_object_and_warns_of_none(ready: Cluster, objects: list[Manifest]) -> None:
    done = ready.kubectl(*STRICT, stdin=render.dump(objects))
    assert len(done.stdout.splitlines()) == len(objects)
    warnings = [line for line in done.stderr.splitlines() if "last-applied-configuration" not in line]
    assert warnings == []
    print(f"{len(objects)} different objects, of {len({m['kind'] for m in objects})} kinds")


@pytest.mark.parametrize("kind", ["Deployment", "PodMonitor", "Certificate", "NetworkPolicy", "Job", "ConfigMap"])
def test_an_unknown_field_is_an_error(ready: Cluster, objects: list[Manifest], kind: str) -> None:
    manifest = yaml.safe_load(yaml.safe_dump(next(each for each in objects if each["kind"] == kind)))
    manifest.get("spec", manifest)["replicaz"] = 1
    done = ready.kubectl(*STRICT, stdin=render.dump([manifest]), ok=(1,))
    assert "replicaz" in done.stderr


def test_a_pod_that_is_not_restricted_would_be_seen(ready: Cluster, objects: list[Manifest]) -> None:
    manifest = yaml.safe_load(yaml.safe_dump(next(each for each in objects if each["kind"] == "Deployment")))
    del manifest["spec"]["template"]["spec"]["securityContext"]["seccompProfile"]
    done = ready.kubectl(*STRICT, stdin=render.dump([manifest]))
    assert "would violate PodSecurity" in done.stderr


def test_the_overlay_that_kubectl_takes_by_itself(ready: Cluster) -> None:
    """`kubectl apply -k`, and before it that of the ledgers, in an administrator's order."""
    for folder in ("local/ledgers", "local"):
        done = ready.kubectl(*STRICT[:3], "--kustomize", str(OVERLAYS / folder))
        assert "deployment.apps/client-002" in done.stdout or "job.batch/ledger-client-002" in done.stdout


def test_two_ways_of_sharing_a_gpu_do_not_stand_together(tmp_path: Path) -> None:
    """Why they are no combination: no node has two sharing strategies, so no pod would ever be placed."""
    overlay = overlay_with(("gpu", "time-slicing", "mps"), tmp_path)
    deployment = next(m for m in everything_of(overlay) if m["metadata"]["name"] == "client-000")
    terms = deployment["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    expressions = terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]["matchExpressions"]
    strategies = [each["values"] for each in expressions if each["key"] == "nvidia.com/gpu.sharing-strategy"]
    assert strategies == [["time-slicing"], ["mps"]]


def everything_of(overlay: Path) -> list[Manifest]:
    from k8s.template import build

    made = render.manifests(build(overlay), fleet("1", overlay))
    return [manifest for manifest in made if manifest["kind"] == "Deployment"]
