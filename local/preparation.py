"""What must lie on the disk before a run starts: ledgers, keys, and the two files that the programs read.

A budget that is unknown stays unknown: a ledger is made before its partition's key, so a key without a ledger
means that the ledger was lost, and that is refused.
"""

import shutil
from pathlib import Path

import yaml

from common import pki
from common.config import ConfigError, Federation, Policy, load
from local.errors import LocalError
from local.parameters import Parameters, apply
from local.records import nominal_records
from server.preflight import LOOPBACK, check_port

STATE = Path("state")
FEDERATION, POLICY = STATE / "config/federation.yaml", STATE / "config/policy.yaml"
_PUBLIC_KEYS = STATE / "config/public_keys"
_CONFIG = Path("config")


def prepare(given: Parameters) -> tuple[Federation, Policy]:
    """The terms of the run, with everything written that it needs.

    Raises:
        LocalError, ConfigError, PkiError: nothing can be started.
    """
    federation, policy = apply(
        given, load(Federation, _CONFIG / FEDERATION.name), load(Policy, _CONFIG / POLICY.name), nominal_records
    )
    _check_addresses(federation, policy)
    _check_ledgers(policy)

    _create_ledgers(policy)
    names = [partition.name for partition in policy.partitions]
    pki.create(STATE / "pki", partitions=names)
    # Each registered key costs the server time, so it is given this run's and no other split's.
    server = federation.server.model_copy(update={"public_keys": _PUBLIC_KEYS})
    shutil.rmtree(_PUBLIC_KEYS, ignore_errors=True)
    _PUBLIC_KEYS.mkdir(parents=True)
    for name in names:
        shutil.copyfile(federation.server.public_keys / f"{name}.pub", _PUBLIC_KEYS / f"{name}.pub")
    federation = federation.model_copy(update={"server": server})
    _write(FEDERATION, federation)
    _write(POLICY, policy)
    return federation, policy


def _check_addresses(federation: Federation, policy: Policy) -> None:
    server, client = federation.server, policy.client
    if server.fleet_address.rpartition(":")[2] != client.server_address.rpartition(":")[2]:
        raise LocalError(
            f"client.server_address: {client.server_address} in policy.yaml, but federation.yaml has"
            f" server.fleet_address {server.fleet_address} (give both the same port)"
        )
    for key, address in {
        "server.fleet_address": server.fleet_address,
        "server.control_port": f"{LOOPBACK}:{server.control_port}",
        "server.metrics_address": server.metrics_address,
        "client.metrics_address": client.metrics_address,
    }.items():
        try:
            check_port(key, address)
        except ConfigError as error:
            raise LocalError(f"{error}; another run may be active") from error


def _check_ledgers(policy: Policy) -> None:
    names = [partition.name for partition in policy.partitions]
    lost = [name for name in names if policy.key_path(name).exists() and not policy.ledger_path(name).exists()]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise LocalError(
            f"{policy.ledger_path(lost[0])}: missing{more}, though {lost[0]} has a key and may have spent budget:"
            " put the ledger back, or give up all of the demo's state with `make forget`"
        )


def _create_ledgers(policy: Policy) -> None:
    missing = [p.name for p in policy.partitions if not policy.ledger_path(p.name).exists()]
    if not missing:
        return
    from client import ledger  # it imports scipy, which takes a second that only a first run needs to wait

    for name in missing:
        try:
            ledger.create(
                policy.ledger_path(name),
                partition=name,
                privacy=policy.privacy,
                anchor=policy.anchor_path(name),
            )
        except ledger.LedgerError as error:
            raise LocalError(str(error)) from error


def _write(path: Path, document: Federation | Policy) -> None:
    content = yaml.safe_dump(document.model_dump(mode="json"), sort_keys=False)
    path.write_text(f"# Made by `make run` from {_CONFIG / path.name} and its parameters.\n{content}")
