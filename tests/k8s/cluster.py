"""A real control plane on loopback: etcd, kube-apiserver, kube-controller-manager, kube-scheduler; gone at the end."""

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from common import pki
from common.process import tethered
from tests.federation import ROOT, free_ports, wait_for
from tests.k8s import binaries
from tests.k8s.api import Api, ApiError

# token, user, uid, groups
_USERS = (
    ("admin-token", "admin", "1", "system:masters"),
    ("scheduler-token", "system:kube-scheduler", "2", ""),
)


class Cluster:
    """A context: entered, its API answers and its default StorageClass is there; left, no process of it is alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        etcd, peer, self.port, manager, scheduler = free_ports(5)
        self._ports = {"etcd": etcd, "peer": peer, "manager": manager, "scheduler": scheduler}
        self.programs = {program: binaries.get(program) for program in binaries.CONTROL_PLANE}
        pki.create(folder / "pki", partitions=[])
        self.authority = folder / "pki/public/ca.crt"
        self.kubeconfig = self._kubeconfig("admin")
        self.api = Api(self.port, self.authority, "admin-token")

    def __enter__(self) -> Self:
        try:
            self._start_etcd()
            self._start_apiserver()
            self._start_manager()
            self._start_scheduler()
            wait_for(self._has_service_accounts, f"the controllers at work; see {self.folder}", 300)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def kubectl(
        self, *arguments: str, stdin: str | None = None, ok: tuple[int, ...] = (0,)
    ) -> subprocess.CompletedProcess[str]:
        """kubectl as the administrator. Fails unless its exit status is one of `ok`."""
        done = subprocess.run(
            [str(self.programs["kubectl"]), "--kubeconfig", str(self.kubeconfig), *arguments],
            input=stdin, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": str(self.folder)},
        )  # fmt: skip
        assert done.returncode in ok, f"kubectl {' '.join(arguments)}: {done.returncode}\n{done.stderr[-4000:]}"
        return done

    def get(self, *arguments: str) -> dict[str, Any]:
        """What `kubectl get` finds, as JSON."""
        return json.loads(self.kubectl("get", *arguments, "--output", "json").stdout)

    def _start(self, name: str, *flags: str) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    tethered([str(self.programs[name]), *flags]),
                    cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{self._ports[name]}" for name in ("etcd", "peer"))
        self._start(
            "etcd", "--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync",
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
        )  # fmt: skip
        wait_for(lambda: self._answers(f"{client}/health"), f"etcd; see {self.folder}/etcd.log", 120)

    def _start_apiserver(self) -> None:
        users = "".join(f'{token},{user},{uid},"{groups}"\n' for token, user, uid, groups in _USERS)
        (self.folder / "users.csv").write_text(users)
        certificate, key = (self.folder / f"pki/server/server.{suffix}" for suffix in ("crt", "key"))
        self._start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._ports['etcd']}",
            "--bind-address=127.0.0.1", f"--secure-port={self.port}", "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}",
            "--authorization-mode=RBAC", f"--token-auth-file={self.folder / 'users.csv'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={certificate}", f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.96.0.0/16",
        )  # fmt: skip
        wait_for(self._ready, f"kube-apiserver; see {self.folder}/kube-apiserver.log", 300)

    def _start_manager(self) -> None:
        self._start(
            "kube-controller-manager", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false",
            "--bind-address=127.0.0.1", f"--secure-port={self._ports['manager']}",
            f"--service-account-private-key-file={self.folder / 'pki/server/server.key'}",
            f"--root-ca-file={self.authority}", "--kube-api-qps=500", "--kube-api-burst=1000",
            "--node-monitor-grace-period=120s",
        )  # fmt: skip

    def _start_scheduler(self) -> None:
        config = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "clientConnection": {"kubeconfig": str(self._kubeconfig("scheduler")), "qps": 500, "burst": 1000},
            "leaderElection": {"leaderElect": False},
        }
        path = self.folder / "scheduler.yaml"
        path.write_text(yaml.safe_dump(config))
        self._start(
            "kube-scheduler", f"--config={path}", "--bind-address=127.0.0.1",
            f"--secure-port={self._ports['scheduler']}",
        )  # fmt: skip

    def _kubeconfig(self, user: str) -> Path:
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.authority),
                    },
                }
            ],
            "users": [{"name": user, "user": {"token": f"{user}-token"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }  # fmt: skip
        path = self.folder / f"{user}.kubeconfig"
        path.write_text(yaml.safe_dump(content))
        return path

    def _answers(self, url: str) -> bool:
        self._check()
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 (loopback)
                return True
        except OSError:
            return False

    def _ready(self) -> bool:
        self._check()
        try:
            return bool(self.api.get("/api/v1/namespaces/default"))
        except (OSError, ApiError):
            return False

    def _has_service_accounts(self) -> bool:
        self._check()
        try:
            return bool(self.api.get("/api/v1/namespaces/default/serviceaccounts/default"))
        except ApiError:
            return False

    def _check(self) -> None:
        for process in self._processes:
            assert process.poll() is None, f"{process.args} ended with {process.returncode}; see {self.folder}"

    def _end(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)
