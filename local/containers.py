"""`python -m local.containers`: compose's one-shot service. Lays out keys, ledgers and configuration in its volumes.

It runs at each `up` and replaces no key and no ledger. The parameters of `make run` come from the environment, under
their own names; one that is empty is not given.
"""

import os
import secrets
import sys
from pathlib import Path

from common.config import ConfigError, Federation, Policy, load
from common.files import LockedError, hold
from common.pki import PkiError
from local import parameters
from local.errors import LocalError
from local.preparation import CONFIG, FEDERATION, POLICY, STATE, lay_out
from local.records import nominal_records

# Between containers: `server` is the service's name in compose.yaml, which publishes the ports.
_SERVER = {"fleet_address": "0.0.0.0:9092", "metrics_address": "0.0.0.0:9465"}
_CLIENT = {"server_address": "server:9092", "metrics_address": "0.0.0.0:9464"}
_PASSWORD = STATE / "grafana/admin-password"


def main() -> int:
    given = [f"{name}={value}" for name in parameters.NAMES if (value := os.environ.get(name))]
    try:
        with hold(STATE / "config/setup.lock", patience=60.0):
            _prepare(parameters.read(given))
    except LockedError as error:
        return _refuse(str(error), 1)
    except LocalError as error:
        return _refuse(str(error), error.code)
    except (ConfigError, PkiError, OSError) as error:
        return _refuse(str(error), 2)
    return 0


def _prepare(given: parameters.Parameters) -> None:
    federation, policy = parameters.apply(
        given, load(Federation, CONFIG / FEDERATION.name), load(Policy, CONFIG / POLICY.name), nominal_records
    )
    federation = federation.model_copy(update={"server": federation.server.model_copy(update=_SERVER)})
    policy = policy.model_copy(update={"client": policy.client.model_copy(update=_CLIENT)})
    lay_out(federation, policy, forget="docker compose down --volumes")
    print(f"{len(policy.partitions)} partitions of {policy.task} have keys and ledgers")
    if not _PASSWORD.exists():
        print(f"Grafana's password for the user admin, said this once: {_create_password(_PASSWORD)}")


def _create_password(path: Path) -> str:
    """A new password in a file that its owner and group may read, once it is whole."""
    password = secrets.token_urlsafe(18)
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(password)
    temporary.rename(path)
    return password


def _refuse(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
