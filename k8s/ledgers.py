"""The Jobs that create ledgers: the owner's explicit act, once, before the client's key is in the cluster.

The invariant: a ledger is made before its partition's key, so a key without a ledger means that the ledger was lost.
The Job mounts the key's Secret if there is one, and `python -m client.ledger begin` refuses then; nothing creates a
ledger by itself, however often a volume comes back empty.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from k8s.clients import Client
from k8s.render import is_client, stamp
from k8s.template import Manifest

_SHARED = ("Namespace", "PriorityClass", "ServiceAccount", "StorageClass")
_LEFT_OUT = ("ports", "readinessProbe", "livenessProbe", "startupProbe", "args")
_WITHOUT = "authority"  # a volume: the server's CA may come after the ledgers, and no server is asked
_COMPONENT = "app.kubernetes.io/component"


def manifests(template: Sequence[Manifest], clients: Iterable[Client]) -> list[Manifest]:
    """A Job per client with what it needs: namespace, claim and policy."""
    made = [manifest for manifest in template if not is_client(manifest) and manifest["kind"] in _SHARED]
    for client in clients:
        for manifest in stamp(template, client):
            made.append(_job(manifest) if manifest["kind"] == "Deployment" else manifest)
    return made


def _job(deployment: Manifest) -> Manifest:
    """The client's own pod, on a node where the client may run, with one command in place of the client."""
    metadata, template = deployment["metadata"], deployment["spec"]["template"]
    labels = {**template["metadata"]["labels"], _COMPONENT: "ledger"}
    spec: dict[str, Any] = {**template["spec"], "restartPolicy": "Never"}
    container = {key: value for key, value in spec["containers"][0].items() if key not in _LEFT_OUT}
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != _WITHOUT]
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != _WITHOUT]
    policy = spec["containers"][0]["args"]
    spec["containers"] = [
        {
            **container,
            "name": "ledger",
            "command": ["python", "-m", "client.ledger", "begin", *policy],
            "resources": {
                "requests": {"cpu": "50m", "memory": "256Mi"},
                "limits": {"cpu": "1", "memory": "512Mi"},
            },
        }
    ]
    for volume in spec["volumes"]:
        if volume["name"] == "keys":
            # Neither Secret nor key has to be there; a key that is lies where the policy looks for it.
            volume["secret"]["optional"] = True
    for constraint in spec.get("topologySpreadConstraints", ()):
        constraint["labelSelector"]["matchLabels"][_COMPONENT] = "ledger"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**metadata, "name": f"ledger-{metadata['name']}", "labels": {**metadata["labels"], **labels}},
        "spec": {
            "backoffLimit": 0,  # a refusal is an answer, not a failure to be tried again
            "activeDeadlineSeconds": 1800,  # a client that runs holds its claim, and this would wait for it
            "ttlSecondsAfterFinished": 86400,
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
