"""A kubelet that really runs the pods: each container a process with the manifest's mounts, user, arguments and probes.

The image is this checkout and the interpreter that runs the tests. A pod has its own network namespace on a bridge that
is made here, so that it has its own address and the ports of the manifest. What a cluster's DNS and kube-proxy would do
is done with /etc/hosts: a Service's name is the address of the pod that it selects.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64decode
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.federation import ROOT, children
from tests.k8s.api import Api, ApiError, Object
from tests.k8s.nodes import Kubelet, conditions, now, running

ENTRYPOINTS = {"fedeps-server": ["python", "-m", "server"], "fedeps-client": ["python", "-m", "client"]}
NETWORK = "10.244.77"
RESTART_SECONDS = 5.0


@dataclass(kw_only=True)
class Container:
    """The one container of a pod, and how it is."""

    pod: Object
    folder: Path
    address: str
    namespace: str
    hosts: Path
    spec: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    ready: bool = False
    started: float = 0.0
    due: dict[str, float] = field(default_factory=dict)  # of the next probe
    failures: dict[str, int] = field(default_factory=dict)
    asked_to_stop: float | None = None


class ProcessKubelet(Kubelet):
    """`folder` keeps the volumes, and a log per container."""

    def __init__(self, api: Api, nodes: dict[str, Object], *, folder: Path) -> None:
        super().__init__(api, nodes)
        self.folder = folder
        self.containers: dict[str, Container] = {}  # by the pod's uid
        self.logs: dict[str, Path] = {}  # by the pod's name
        self._name = f"fdp{os.getpid()}"
        self._next = 1
        # The bridge has a namespace of its own: whatever else is on this machine, a firewall between pods is not.
        ip("netns", "add", self._name)
        ip("-n", self._name, "link", "add", "pods", "type", "bridge")
        ip("-n", self._name, "link", "set", "pods", "up")
        ip("link", "add", self._name, "type", "veth", "peer", "name", "host", "netns", self._name)
        ip("-n", self._name, "link", "set", "host", "master", "pods", "up")
        ip("address", "add", f"{NETWORK}.1/24", "dev", self._name)
        ip("link", "set", self._name, "up")

    def volume_folder(self, namespace: str, claim: str) -> str:
        path = self.folder / "volumes" / namespace / claim
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def tick(self) -> None:
        super().tick()
        self._write_hosts()

    def start(self, pod: Object) -> Object | None:
        uid = pod["metadata"]["uid"]
        if pod["status"]["phase"] in ("Succeeded", "Failed"):
            return None
        if uid not in self.containers:
            container = self._prepare(pod)
            if container is None:
                return None  # as a kubelet waits for a Secret or a volume
            self.containers[uid] = container
            self._run(container)
            return self._status(container)
        container = self.containers[uid]
        code = container.process.poll() if container.process else None
        if code is not None:
            if pod["spec"]["restartPolicy"] == "Never":
                return self._ended(container, code)
            if time.monotonic() - container.started > RESTART_SECONDS:
                container.restarts += 1
                self._run(container)
                return self._status(container)
        before = (container.ready, container.restarts)
        self._probe(container)
        return self._status(container) if (container.ready, container.restarts) != before else None

    def stop(self, pod: Object) -> bool:
        container = self.containers.get(pod["metadata"]["uid"])
        if container is None:
            return True
        process, grace = container.process, pod["metadata"].get("deletionGracePeriodSeconds", 30)
        if process is not None and process.poll() is None:
            if container.asked_to_stop is None:
                container.asked_to_stop = time.monotonic()
                self._signal(container, signal.SIGTERM)
            elif time.monotonic() - container.asked_to_stop > grace:
                self._signal(container, signal.SIGKILL)
            return False
        self._remove(container)
        del self.containers[pod["metadata"]["uid"]]
        return True

    def end(self) -> None:
        super().end()
        for container in list(self.containers.values()):
            self._signal(container, signal.SIGKILL)
            if container.process is not None:
                container.process.wait()
            self._remove(container)
        ip("link", "delete", self._name)
        ip("netns", "delete", self._name)

    def log(self, pod: str) -> str:
        return self.logs[pod].read_text(errors="replace")

    def _prepare(self, pod: Object) -> Container | None:
        metadata, spec = pod["metadata"], pod["spec"]
        folder = self.folder / "pods" / metadata["name"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        volumes = {}
        for volume in spec["volumes"]:
            source = self._volume(volume, metadata["namespace"], folder, spec["securityContext"])
            if source is None:
                return None
            volumes[volume["name"]] = str(source)
        container = spec["containers"][0]
        context = {**spec["securityContext"], **container["securityContext"]}
        assert context["runAsNonRoot"]
        assert context["runAsUser"] > 0
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["allowPrivilegeEscalation"] is False
        image = container["image"].rpartition(":")[0].rpartition("/")[2]
        address, namespace = self._network()
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n")
        path = folder / "container.json"
        # What the image holds: the code, and Python where the tests have it.
        paths = {str(ROOT): "/app", sys.prefix: sys.prefix, sys.base_prefix: sys.base_prefix}
        content = {
            "folder": str(folder),
            "hosts": str(hosts),
            "image": {
                source: target
                for source, target in paths.items()
                if not target.startswith(("/usr/", "/opt/")) or target == "/app"
            },
            "mounts": [
                {
                    "source": volumes[mount["name"]], "path": mount["mountPath"],
                    "read_only": mount.get("readOnly", False),
                }
                for mount in container["volumeMounts"]
            ],
            "read_only_root": context["readOnlyRootFilesystem"],
            "directory": container.get("workingDir", "/app"),
            "user": context["runAsUser"], "group": context["runAsGroup"], "groups": [context["fsGroup"]],
            "command": container.get("command", ENTRYPOINTS[image]) + container.get("args", []),
            "environment": {
                "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": "/app", "HOME": "/tmp",
                "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                **{each["name"]: each["value"] for each in container.get("env", [])},
            },
        }  # fmt: skip
        path.write_text(json.dumps(content))
        self.logs[metadata["name"]] = folder / "log"
        return Container(pod=pod, folder=folder, address=address, namespace=namespace, hosts=hosts, spec=path)

    def _volume(self, volume: Object, namespace: str, folder: Path, context: Object) -> Path | None:
        """The folder that is mounted, None while what should be in it is not there."""
        place = folder / "volumes" / volume["name"]
        core = f"/api/v1/namespaces/{namespace}"
        try:
            if "persistentVolumeClaim" in volume:
                claim = self.api.get(f"{core}/persistentvolumeclaims/{volume['persistentVolumeClaim']['claimName']}")
                if claim["status"].get("phase") != "Bound":
                    return None
                persistent = self.api.get(f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}")
                place = Path(persistent["spec"]["hostPath"]["path"])
                data: dict[str, bytes] = {}
            elif "configMap" in volume:
                found = self.api.get(f"{core}/configmaps/{volume['configMap']['name']}")
                data = {name: text.encode() for name, text in found.get("data", {}).items()}
            elif "secret" in volume:
                found = self.api.get(f"{core}/secrets/{volume['secret']['secretName']}")
                data = {name: b64decode(text) for name, text in found.get("data", {}).items()}
            else:
                assert set(volume) == {"name", "emptyDir"}, volume
                data = {}
        except ApiError as error:
            if error.status == 404:
                if volume.get("secret", {}).get("optional"):
                    place.mkdir(parents=True)
                    return place
                return None
            raise
        place.mkdir(parents=True, exist_ok=True)
        source = volume.get("configMap") or volume.get("secret") or {}
        if source.get("items"):
            optional = source.get("optional", False)  # of the Secret and of each key
            items = [item for item in source["items"] if item["key"] in data or not optional]
            data = {item["path"]: data[item["key"]] for item in items}
        for name, content in data.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
            (place / name).chmod(source.get("defaultMode", 0o644) | 0o440)
            os.chown(place / name, 0, context["fsGroup"])
        if "persistentVolumeClaim" in volume or "emptyDir" in volume:
            os.chown(place, 0, context["fsGroup"])
            place.chmod(0o2775)
        return place

    def _network(self) -> tuple[str, str]:
        self._next += 1
        number, namespace = self._next, f"{self._name}n{self._next}"
        assert number < 255
        address, outside = f"{NETWORK}.{number}", f"pod{number}"
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", outside, "netns", self._name)
        ip("-n", self._name, "link", "set", outside, "master", "pods", "up")
        ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        return address, namespace

    def _run(self, container: Container) -> None:
        shutil.rmtree(container.folder / "root", ignore_errors=True)
        with open(container.folder / "log", "ab") as log:
            container.process = subprocess.Popen(
                [
                    "ip", "netns", "exec", container.namespace,
                    "unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child",
                    sys.executable, "-m", "tests.k8s.container", str(container.spec),
                ],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        container.started = time.monotonic()
        container.ready = False
        container.due, container.failures = {}, {}

    def _probe(self, container: Container) -> None:
        """The manifest's probes, at its intervals."""
        spec = container.pod["spec"]["containers"][0]
        for kind in ("readinessProbe", "livenessProbe"):
            probe = spec.get(kind)
            if probe is None:
                container.ready = True
                continue
            moment = time.monotonic()
            if moment < container.due.setdefault(kind, container.started + probe.get("initialDelaySeconds", 0)):
                continue
            container.due[kind] = moment + probe["periodSeconds"]
            failed = 0 if self._answers(container, spec, probe) else container.failures.get(kind, 0) + 1
            container.failures[kind] = failed
            if kind == "readinessProbe" and (failed == 0 or failed >= probe["failureThreshold"]):
                container.ready = failed == 0
            if kind == "livenessProbe" and failed >= probe["failureThreshold"]:
                self._signal(container, signal.SIGKILL)

    def _answers(self, container: Container, spec: Object, probe: Object) -> bool:
        get = probe["httpGet"]
        port = next(each["containerPort"] for each in spec["ports"] if each["name"] == get["port"])
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            url = f"http://{container.address}:{port}{get['path']}"
            with opener.open(url, timeout=probe["timeoutSeconds"]):
                return True
        except (OSError, urllib.error.URLError):
            return False

    def _write_hosts(self) -> None:
        """What DNS and kube-proxy would do."""
        names: dict[str, list[str]] = {}
        for service in self.api.items("/api/v1/services"):
            name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
            selector = service["spec"].get("selector")
            for container in self.containers.values():
                labels = container.pod["metadata"]["labels"]
                if not selector or not selector.items() <= labels.items():
                    continue
                ports = {
                    port["name"]: port["containerPort"]
                    for port in container.pod["spec"]["containers"][0].get("ports", [])
                }
                assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
                names.setdefault(container.address, []).extend([name, f"{name}.{namespace}", f"{name}.{namespace}.svc"])
                break
        lines = ["127.0.0.1 localhost", *(f"{address} {' '.join(each)}" for address, each in names.items())]
        text = "\n".join(lines) + "\n"
        for container in self.containers.values():
            if container.hosts.read_text() != text:
                container.hosts.write_text(text)  # in place: it is mounted

    def _status(self, container: Container) -> Object:
        status: dict[str, Any] = running(container.pod, ready=container.ready)
        status["containerStatuses"][0]["restartCount"] = container.restarts
        return {**status, "podIP": container.address, "podIPs": [{"ip": container.address}]}

    def _ended(self, container: Container, code: int) -> Object:
        containers = running(container.pod, ready=False)["containerStatuses"]
        containers[0]["state"] = {
            "terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "finishedAt": now()}
        }
        phase = "Succeeded" if code == 0 else "Failed"
        return {"phase": phase, "conditions": conditions(False), "containerStatuses": containers}

    def _signal(self, container: Container, number: int) -> None:
        """To the container's first process: all others of it go with it."""
        if container.process is None or container.process.poll() is not None:
            return
        for pid in children(container.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _remove(self, container: Container) -> None:
        ip("netns", "delete", container.namespace)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def refusal() -> str | None:
    """Why pods cannot be run here, None where they can."""
    if os.geteuid() != 0:
        return "running pods takes root: namespaces, mounts and another user"
    missing = [program for program in ("ip", "unshare", "mount") if shutil.which(program) is None]
    return f"running pods takes {', '.join(missing)} on PATH (iproute2, util-linux)" if missing else None
