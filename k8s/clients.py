"""Who takes part: the clients of a fleet, each with the policy that its pod obeys, checked as the pod will check it.

The invariant: what one client is does not depend on how many others there are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from common.config import ConfigError, Partition, Policy, load, parse, read

ClientName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]  # a pod's name adds to it


class Owner(BaseModel):
    """One entry of a fleet's file: an owner's pod."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: ClientName
    partitions: Annotated[list[Partition], Field(min_length=1)] | None = None  # one of the client's own name
    policy: dict[str, Any] = {}  # laid over the overlay's policy.yaml
    paused: bool = False  # no pod; claim, key and ledger stay


class Owners(BaseModel):
    """A fleet's file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    clients: Annotated[list[Owner], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """One pod, with all that makes it differ from the others."""

    name: str
    partitions: tuple[str, ...]
    policy: str  # the text of its policy.yaml
    paused: bool


def fleet(wanted: str, overlay: Path) -> list[Client]:
    """The clients that `wanted` stands for: a number, or the path of a fleet's file.

    Raises:
        ConfigError: naming the client whose policy would be refused by its pod, or a partition that two claim.
    """
    path = overlay / "policy.yaml"
    common = read(path)
    parse(Policy, common, source=str(path))  # so that a mistake of the overlay's is told once, as the overlay's
    owners = numbered(int(wanted), common, path) if wanted.isdecimal() else load(Owners, Path(wanted)).clients
    source = str(path) if wanted.isdecimal() else wanted
    clients = [_client(owner, common, f"{source}: {owner.name}") for owner in owners]
    _check_unique(source, "clients", [client.name for client in clients])
    _check_unique(source, "partitions", [name for client in clients for name in client.partitions])
    return clients


def numbered(count: int, common: dict[str, Any], path: Path) -> list[Owner]:
    """`count` owners of one part each: of the split that the overlay's policy names, however many take part."""
    parts = common["partitions"][0].get("of", 1)
    if not 1 <= count <= parts:
        raise ConfigError(
            f"clients: expected 1 to {parts}, found {count} (the split in {path}: partitions[0].of; another split is"
            " other data under the same names, which no budget survives)"
        )
    names = [f"client-{index:03}" for index in range(count)]
    return [
        Owner(name=name, partitions=[Partition(name=name, index=index, of=parts)]) for index, name in enumerate(names)
    ]


def listing(clients: list[Client]) -> str:
    """The same fleet as a file to go on from."""
    entries = []
    for client in clients:
        partitions = yaml.safe_load(client.policy)["partitions"]
        entries.append({"name": client.name, "partitions": partitions, **({"paused": True} if client.paused else {})})
    return yaml.safe_dump({"clients": entries}, sort_keys=False, default_flow_style=None, width=120)


def _client(owner: Owner, common: dict[str, Any], source: str) -> Client:
    partitions = owner.partitions or [Partition(name=owner.name)]
    content = _merge(common, owner.policy)
    content["partitions"] = [partition.model_dump() for partition in partitions]
    parse(Policy, content, source=source)
    return Client(
        name=owner.name,
        partitions=tuple(partition.name for partition in partitions),
        policy=yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False),
        paused=owner.paused,
    )


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_unique(source: str, what: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{source}: {what}: expected each name once, found {', '.join(twice)} twice")
