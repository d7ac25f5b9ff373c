"""An overlay's template and a fleet's clients as the manifests of all of them.

The invariant: a client's objects come from the template and that client alone, so that a change to one client is a
change to its objects and to no other's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml

from k8s.clients import Client
from k8s.template import Manifest, annotate, digest

PLACEHOLDER = "CLIENT-NAME"
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Text(_Dumper):
    """Texts of several lines as such, so that a person can read a policy in its ConfigMap."""


_Text.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def manifests(template: Sequence[Manifest], clients: Iterable[Client]) -> list[Manifest]:
    """What all clients share, then each client's own objects."""
    shared = [manifest for manifest in template if not is_client(manifest)]
    return [*shared, *(manifest for client in clients for manifest in stamp(template, client))]


def stamp(template: Sequence[Manifest], client: Client) -> list[Manifest]:
    """The template's client objects as `client`'s."""
    stamped = [_replace(manifest, client.name) for manifest in template if is_client(manifest)]
    for manifest in stamped:
        if manifest["kind"] == "ConfigMap":
            manifest["data"]["policy.yaml"] = client.policy
        elif manifest["kind"] == "Deployment":
            manifest["spec"]["replicas"] = 0 if client.paused else 1
            annotate(manifest, "checksum/policy", digest(client.policy))
            volumes = manifest["spec"]["template"]["spec"]["volumes"]
            keys = next(volume["secret"] for volume in volumes if volume["name"] == "keys")
            keys["items"] = [{"key": name, "path": f"{name}/key"} for name in client.partitions]
    return stamped


def is_client(manifest: Manifest) -> bool:
    """Whether the object exists once per client."""
    return PLACEHOLDER in manifest["metadata"]["name"]


def dump(manifests: Iterable[Manifest]) -> str:
    """A stream of YAML documents: the same objects, the same bytes."""
    return yaml.dump_all(manifests, Dumper=_Text, sort_keys=False, explicit_start=True, width=120)


def _replace(value: Any, name: str) -> Any:
    return _map_strings(value, lambda text: text.replace(PLACEHOLDER, name))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy that shares nothing, so that no YAML alias can appear."""
    if isinstance(value, dict):
        return {key: _map_strings(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_map_strings(each, change) for each in value]
    return change(value) if isinstance(value, str) else value
