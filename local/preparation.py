"""What must lie on the disk before a run starts: ledgers, keys, and the two files that the programs read.

A budget that is unknown stays unknown: a ledger is made before its partition's key, so a key without a ledger
means that the ledger was lost, and that is refused.
"""

from pathlib import Path

import yaml

from common import pki
from common.config import ConfigError, Federation, Policy, load
from common.files import replace
from local.errors import LocalError
from local.parameters import Parameters, apply
from local.records import nominal_records
from server.preflight import LOOPBACK, check_port

STATE = Path("state")
CONFIG = Path("config")
FEDERATION, POLICY = STATE / "config/federation.yaml", STATE / "config/policy.yaml"
_PUBLIC_KEYS = STATE / "config/public_keys"


def prepare(given: Parameters) -> tuple[Federation, Policy]:
    """The terms of the run, with everything written that it needs.

    Raises:
        LocalError, ConfigError, PkiError: nothing can be started.
    """
    federation, policy = apply(
        given, load(Federation, CONFIG / FEDERATION.name), load(Policy, CONFIG / POLICY.name), nominal_records
    )
    _check_addresses(federation, policy)
    return lay_out(federation, policy, forget="make forget"), policy


def lay_out(federation: Federation, policy: Policy, *, forget: str) -> Federation:
    """Write ledgers, keys and the two files where they are missing; returns the federation with this run's keys.

    Raises:
        LocalError, PkiError: nothing can be started. `forget` is the command that gives up all state.
    """
    _check_ledgers(policy, forget)
    _create_ledgers(policy)
    names = [partition.name for partition in policy.partitions]
    pki.create(STATE / "pki", partitions=names)
    # Each registered key costs the server time, so it is given this run's and no other split's. A server may be
    # starting right now, so none of them is ever missing in between.
    _PUBLIC_KEYS.mkdir(parents=True, exist_ok=True)
    for name in names:
        replace(_PUBLIC_KEYS / f"{name}.pub", (federation.server.public_keys / f"{name}.pub").read_bytes())
    for public in _PUBLIC_KEYS.glob("*.pub"):
        if public.stem not in names:
            public.unlink()
    server = federation.server.model_copy(update={"public_keys": _PUBLIC_KEYS})
    federation = federation.model_copy(update={"server": server})
    _write(FEDERATION, federation)
    _write(POLICY, policy)
    return federation


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


def _check_ledgers(policy: Policy, forget: str) -> None:
    names = [partition.name for partition in policy.partitions]
    lost = [name for name in names if policy.key_path(name).exists() and not policy.ledger_path(name).exists()]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise LocalError(
            f"{policy.ledger_path(lost[0])}: missing{more}, though {lost[0]} has a key and may have spent budget:"
            f" put the ledger back, or give up all of the demo's state with `{forget}`"
        )


def _create_ledgers(policy: Policy) -> None:
    if all(policy.ledger_path(partition.name).exists() for partition in policy.partitions):
        return
    from client import ledger  # it imports scipy, which takes a second that only a first run needs to wait

    try:
        ledger.begin(policy)
    except ledger.LedgerError as error:
        raise LocalError(str(error)) from error


def _write(path: Path, document: Federation | Policy) -> None:
    content = yaml.safe_dump(document.model_dump(mode="json"), sort_keys=False)
    replace(path, f"# Made from {CONFIG / path.name} and the parameters that were given.\n{content}".encode())
