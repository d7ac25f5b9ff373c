"""An overlay as kustomize builds it for one client, with the files of the repository filled in.

kustomize says what, where and whether, once; the clients are stamped out of the result (k8s.render).
"""

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from common.config import ConfigError, Federation, parse

ROOT = Path(__file__).parent.parent
OVERLAYS = ROOT / "k8s/overlays"

Manifest = dict[str, Any]

PART_OF = "app.kubernetes.io/part-of"
_FROM = "fedeps/from"  # an annotation: the files, relative to the repository, that fill the object


def overlay_folder(overlay: str) -> Path:
    """The folder of an overlay, given by its name here or by a path. Raises ConfigError."""
    folder = OVERLAYS / overlay if "/" not in overlay else Path(overlay)
    if not (folder / "template/kustomization.yaml").is_file():
        known = ", ".join(sorted(path.name for path in OVERLAYS.iterdir()))
        raise ConfigError(f"overlay: no {folder}/template/kustomization.yaml (known: {known}; or give a path)")
    return folder


def build(overlay: Path) -> list[Manifest]:
    """The objects of the overlay, one client among them.

    Raises:
        ConfigError: kustomize takes it badly, or a file that fills an object cannot be used.
    """
    if (kubectl := shutil.which("kubectl")) is None:
        raise ConfigError("kubectl: not found on PATH (it holds kustomize, which builds the overlay)")
    built = subprocess.run([kubectl, "kustomize", str(overlay / "template")], capture_output=True, text=True)
    if built.returncode != 0:
        raise ConfigError(f"{overlay}: {' '.join(built.stderr.split())}")
    manifests = list(yaml.load_all(built.stdout, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    version = _version()
    for manifest in manifests:
        # What components bring, too: `kubectl apply --selector` passes over what lacks it.
        manifest["metadata"].setdefault("labels", {})[PART_OF] = "fedeps"
        _fill(manifest)
        _tag(manifest, version)
    _configure_server(manifests, overlay / "federation.yaml")
    return manifests


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    return next(each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name)


def digest(text: str) -> str:
    """What a pod's template carries of its configuration, so that it is replaced when, and only when, that changes."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def annotate(deployment: Manifest, key: str, value: str) -> None:
    deployment["spec"]["template"]["metadata"].setdefault("annotations", {})[key] = value


def _configure_server(manifests: list[Manifest], path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    content = parse(Federation, yaml.safe_load(text), source=str(path))
    named(manifests, "ConfigMap", "server")["data"]["federation.yaml"] = text
    annotate(named(manifests, "Deployment", "server"), "checksum/federation", digest(content.model_dump_json()))


def _fill(manifest: Manifest) -> None:
    annotations = manifest["metadata"].get("annotations", {})
    patterns = annotations.pop(_FROM, None)
    if patterns is None:
        return
    if not annotations:
        del manifest["metadata"]["annotations"]
    files = [path for pattern in patterns.split() for path in sorted(ROOT.glob(pattern))]
    if not files:
        raise ConfigError(f"{manifest['kind']} {manifest['metadata']['name']}: no file matches {patterns}")
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    if manifest["kind"] == "ConfigMap":
        manifest["data"] = texts
    else:  # PrometheusRule
        manifest["spec"]["groups"] = [group for text in texts.values() for group in yaml.safe_load(text)["groups"]]


def _tag(manifest: Manifest, version: str) -> None:
    if manifest["kind"] != "Deployment":
        return
    for container in manifest["spec"]["template"]["spec"]["containers"]:
        if not {":", "@"} & set(container["image"].rpartition("/")[2]):
            container["image"] += f":{version}"


def _version() -> str:
    """The tag of our images, from the one place that has it."""
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    try:
        return values["FEDEPS_VERSION"]
    except KeyError:
        raise ConfigError(f"{ROOT / '.env'}: FEDEPS_VERSION: missing (the tag of the images)") from None
