"""The custom resources' definitions, from the modules of those who define them."""

import json
import shutil
import subprocess
from pathlib import Path

from tests.k8s.binaries import Missing

# module, version, the folder of its definitions, those that our manifests use
SOURCES = (
    ("github.com/cert-manager/cert-manager", "v1.21.2", "deploy/crds", ("certificates", "issuers")),
    (
        "github.com/prometheus-operator/prometheus-operator", "v0.85.0", "example/prometheus-operator-crd",
        ("podmonitors", "prometheusrules"),
    ),
)  # fmt: skip


def files() -> list[Path]:
    """Raises Missing, naming the module that cannot be had."""
    found = []
    for module, version, folder, wanted in SOURCES:
        root = _download(f"{module}@{version}") / folder
        found += [path for plural in wanted for path in root.glob(f"*_{plural}.yaml")]
    return found


def _download(module: str) -> Path:
    if (go := shutil.which("go")) is None:
        raise Missing(f"{module}: no go on PATH to get it with")
    done = subprocess.run([go, "mod", "download", "-json", module], capture_output=True, text=True)
    if done.returncode != 0:
        raise Missing(f"{module}: {' '.join((done.stderr + done.stdout).split())[:1000]}")
    return Path(json.loads(done.stdout)["Dir"])
