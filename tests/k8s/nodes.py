"""Fake nodes with a fake kubelet: bound pods run, deleted pods go, claims get volumes. Everything above is real."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from tests.k8s.api import Api, ApiError, Object
from tests.k8s.cluster import Cluster

PROVISIONER = "fedeps.test/folders"
GPU_LABELS = {
    "nvidia.com/gpu.present": "true",
    "nvidia.com/gpu.family": "hopper",
    "nvidia.com/gpu.sharing-strategy": "time-slicing",
}
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
TICK_SECONDS = 0.5
LEASE_SECONDS = 10


class Kubelet:
    """One kubelet for all of the nodes. `start` and `stop` are what a subclass does with a pod."""

    def __init__(self, api: Api, nodes: dict[str, Object]) -> None:
        self.api = api
        self.nodes = nodes
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._renewed = 0.0
        self._addresses: dict[str, str] = {}

    def tick(self) -> None:
        """One look at everything."""
        for pod in self.api.items("/api/v1/pods"):
            if pod["spec"].get("nodeName") not in self.nodes:
                continue
            if pod["metadata"].get("deletionTimestamp"):
                if self.stop(pod):
                    with suppress(ApiError):
                        self.api.delete(path_of(pod), grace=0)
            elif (status := self.start(pod)) is not None:
                with suppress(ApiError):
                    self.api.patch(f"{path_of(pod)}/status", {"status": status})
        for claim in self.api.items("/api/v1/persistentvolumeclaims"):
            self._provision(claim)

    def start(self, pod: Object) -> Object | None:
        """The pod's new status, None where nothing is new."""
        if pod["status"]["phase"] != "Pending":
            return None
        if pod["spec"]["restartPolicy"] == "Never":
            return {"phase": "Succeeded", "conditions": conditions(False)}
        return {**running(pod, ready=True), "podIP": self._address(pod), "podIPs": [{"ip": self._address(pod)}]}

    def stop(self, pod: Object) -> bool:  # noqa: ARG002 (a subclass's)
        """Whether nothing is left of the pod."""
        return True

    def run(self) -> None:
        lease_due = 0
        while not self._stop.wait(TICK_SECONDS):
            try:
                lease_due -= 1
                if lease_due < 0:
                    self.renew_leases()
                    lease_due = int(LEASE_SECONDS / TICK_SECONDS)
                self.tick()
            except Exception as error:  # a test reads it
                self.errors.append(f"{type(error).__name__}: {error}")

    def end(self) -> None:
        self._stop.set()

    def renew_leases(self) -> None:
        """What tells the controller manager that a node lives."""
        for name in self.nodes:
            spec = {
                "holderIdentity": name, "leaseDurationSeconds": 120,
                "renewTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            }  # fmt: skip
            try:
                self.api.patch(f"{LEASES}/{name}", {"spec": spec})
            except ApiError as error:
                if error.status != 404:
                    raise
                metadata = {"name": name, "namespace": "kube-node-lease"}
                self.api.create(
                    LEASES,
                    {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec},
                )

    def _address(self, pod: Object) -> str:
        uid = pod["metadata"]["uid"]
        number = len(self._addresses) + 1
        return self._addresses.setdefault(uid, f"10.244.{number // 250}.{number % 250 + 1}")

    def _provision(self, claim: Object) -> None:
        """A volume for a claim whose pod the scheduler has given a node."""
        metadata = claim["metadata"]
        node = metadata.get("annotations", {}).get("volume.kubernetes.io/selected-node")
        if claim["status"].get("phase") == "Bound" or node is None:
            return
        name = f"pvc-{metadata['uid']}"
        spec = {
            "accessModes": claim["spec"]["accessModes"],
            "capacity": {"storage": claim["spec"]["resources"]["requests"]["storage"]},
            "claimRef": {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim", "uid": metadata["uid"],
                "name": metadata["name"], "namespace": metadata["namespace"],
            },
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": claim["spec"].get("storageClassName", ""),
            "hostPath": {"path": self.volume_folder(metadata["namespace"], metadata["name"])},
        }  # fmt: skip
        annotations = {"pv.kubernetes.io/provisioned-by": PROVISIONER}
        volume = {
            "apiVersion": "v1", "kind": "PersistentVolume", "spec": spec,
            "metadata": {"name": name, "annotations": annotations},
        }  # fmt: skip
        try:
            self.api.create("/api/v1/persistentvolumes", volume)
        except ApiError as error:
            if error.status != 409:
                raise

    def volume_folder(self, namespace: str, claim: str) -> str:
        return f"/var/lib/volumes/{namespace}/{claim}"


def path_of(pod: Object) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def conditions(ready: bool) -> list[Object]:
    when = now()
    return [
        {"type": kind, "status": status, "lastTransitionTime": when}
        for kind, status in (
            ("PodScheduled", "True"),
            ("Initialized", "True"),
            ("ContainersReady", str(ready)),
            ("Ready", str(ready)),
        )
    ]


def running(pod: Object, *, ready: bool) -> Object:
    when = now()
    containers = [
        {
            "name": container["name"], "image": container["image"], "imageID": container["image"], "ready": ready,
            "started": True, "restartCount": 0, "state": {"running": {"startedAt": when}},
        }
        for container in pod["spec"]["containers"]
    ]  # fmt: skip
    return {
        "phase": "Running", "conditions": conditions(ready), "containerStatuses": containers,
        "hostIP": "127.0.0.1", "startTime": when,
    }  # fmt: skip


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def node(name: str, *, gpus: int = 0, labels: dict[str, str] | None = None) -> Object:
    """A node as a kubelet and GPU feature discovery would have announced it."""
    capacity = {"cpu": "96", "memory": "512Gi", "pods": "110", "ephemeral-storage": "1Ti"}
    taints = []
    if gpus:
        capacity["nvidia.com/gpu"] = str(gpus)
        taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
    when = now()
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **(labels or {})},
        },
        "spec": {"taints": taints},
        "status": {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": [
                {
                    "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
                    "lastHeartbeatTime": when, "lastTransitionTime": when,
                }
            ],
        },
    }  # fmt: skip


@contextmanager
def nodes(
    cluster: Cluster, made: list[Object], kubelet: Callable[[Api, dict[str, Object]], Kubelet] = Kubelet
) -> Iterator[Kubelet]:
    """The nodes, alive until the end, and the default StorageClass whose volumes they provide."""
    api = Api(cluster.port, cluster.authority, "admin-token")
    runs = kubelet(api, {each["metadata"]["name"]: each for each in made})
    runs.renew_leases()
    for each in made:
        api.create("/api/v1/nodes", each)
    storage = "/apis/storage.k8s.io/v1/storageclasses"
    with suppress(ApiError):
        api.create(storage, storage_class("standard"))
    thread = threading.Thread(target=runs.run, name="kubelet", daemon=True)
    thread.start()
    try:
        yield runs
    finally:
        runs.end()
        thread.join(60)
        for each in made:
            api.delete(f"/api/v1/nodes/{each['metadata']['name']}")


def storage_class(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": PROVISIONER,
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Retain",
    }
