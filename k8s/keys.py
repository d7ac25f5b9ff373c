"""The key pairs of a `common.pki` folder as Secrets and ConfigMaps, for standard output and never for a file in git.

A client's Secret holds its partitions' private keys and nothing else; the CA's key is never read.
"""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.certificates import PkiError
from k8s.clients import Client
from k8s.template import PART_OF, Manifest, named

_LABELS = {PART_OF: "fedeps", "app.kubernetes.io/name": "fedeps"}


def manifests(template: Sequence[Manifest], clients: Iterable[Client], pki: Path) -> list[Manifest]:
    """The clients' Secrets, the public keys that the server admits, and, unless cert-manager makes them, TLS and CA.

    Raises:
        PkiError: a key is not there.
    """
    namespace = named(list(template), "Deployment", "server")["metadata"]["namespace"]
    made = []
    if not any(manifest["kind"] == "Certificate" for manifest in template):
        authority = {"ca.crt": _read(pki / "public/ca.crt")}
        pair = {"tls.crt": _read(pki / "server/server.crt"), "tls.key": _read(pki / "server/server.key")}
        made += [_public("authority", namespace, authority), _secret("server-tls", namespace, {**authority, **pair})]
        made[-1]["type"] = "kubernetes.io/tls"
    public = sorted((pki / "public/clients").glob("*.pub"))
    made.append(_public("partitions", namespace, {path.name: _read(path) for path in public}))
    for client in clients:
        keys = {name: _read(pki / "clients" / name / "key") for name in client.partitions}
        secret = _secret(client.name, namespace, keys)
        secret["metadata"]["labels"] |= {
            "app.kubernetes.io/component": "client",
            "app.kubernetes.io/instance": client.name,
        }
        made.append(secret)
    return made


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PkiError(f"{path}: {error.strerror} (python -m common.pki create makes it)") from error


def _public(name: str, namespace: str, data: dict[str, bytes]) -> Manifest:
    metadata = {"name": name, "namespace": namespace, "labels": dict(_LABELS)}
    texts = {key: value.decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": texts}


def _secret(name: str, namespace: str, data: dict[str, bytes]) -> Manifest:
    metadata = {"name": name, "namespace": namespace, "labels": dict(_LABELS)}
    encoded = {key: b64encode(value).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": encoded}
