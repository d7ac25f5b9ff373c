"""Every set of components that may stand together, on every overlay's configuration."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from k8s import keys, ledgers, render
from k8s.clients import Client
from k8s.template import OVERLAYS, ROOT, Manifest, build

SHARING = ((), ("gpu",), ("gpu", "time-slicing"), ("gpu", "mps"), ("gpu", "mig"))
MONITORING = ((), ("monitoring/operator",), ("monitoring/annotations",))
OTHERS = ("tls-cert-manager", "network-policy", "local-ledger")


def component_sets() -> Iterator[tuple[str, ...]]:
    """Each list that a kustomization may name."""
    choices = [((), (other,)) for other in OTHERS]
    for parts in itertools.product(SHARING, MONITORING, *choices):
        yield tuple(itertools.chain(*parts))


def overlay_with(components: tuple[str, ...], folder: Path, *, like: str = "local") -> Path:
    """An overlay of exactly these components, under `folder`."""
    overlay = folder / ("-".join(components).replace("/", "-") or "base")
    (overlay / "template").mkdir(parents=True)
    for name in ("policy.yaml", "federation.yaml"):
        shutil.copyfile(OVERLAYS / like / name, overlay / name)
    root = os.path.relpath(ROOT / "k8s", (overlay / "template").resolve())
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{root}/base"],
        "components": [f"{root}/components/{component}" for component in components],
    }
    (overlay / "template/kustomization.yaml").write_text(yaml.safe_dump(content))
    return overlay


def everything(overlay: Path, clients: list[Client], pki: Path) -> list[Manifest]:
    """All that an administrator ever applies of an overlay: ledgers, keys and the fleet."""
    template = build(overlay)
    return [
        *ledgers.manifests(template, clients),
        *keys.manifests(template, clients, pki),
        *render.manifests(template, clients),
    ]
