"""The first ledgers of a policy's partitions: made before the partitions' keys, or not at all.

The invariant: a key without a ledger means that the ledger was lost. What it had spent is not known, so that nothing
is made in its place.
"""

import os
from pathlib import Path

from client.ledger.writer import LedgerError, create
from common.config import Policy


def begin(policy: Policy) -> list[Path]:
    """Creates the ledger of each partition that has neither key nor ledger; returns the paths made.

    Raises:
        LedgerError: a partition has a key and no ledger; nothing was made. Or a ledger cannot be written.
    """
    names = [partition.name for partition in policy.partitions]
    missing = [name for name in names if not policy.ledger_path(name).exists()]
    for name in missing:
        if os.path.lexists(policy.key_path(name).parent):  # any trace of a key, whatever its shape
            raise LedgerError(
                f"{policy.ledger_path(name)}: missing, but partition {name} has a key and may have spent budget:"
                " put the ledger back; what it spent is not known"
            )
    for name in missing:
        create(policy.ledger_path(name), partition=name, privacy=policy.privacy, anchor=policy.anchor_path(name))
    return [policy.ledger_path(name) for name in missing]
