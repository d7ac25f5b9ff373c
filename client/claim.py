"""One partition for this process out of a policy that many processes share: the first that none of them holds.

The invariant: the lock is held for the process's life, so that no two serve the same partition, and the kernel drops
it with its holder, so that no partition is lost. The ledger's own lock and the server's check of keys stand behind it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from common.config import ConfigError, Policy
from common.files import LockedError, hold


@contextmanager
def claimed(policy: Policy) -> Iterator[Policy]:
    """The policy with one partition only, which nobody else can claim until the context is left.

    Raises:
        ConfigError: every partition is held, or the folder of the ledgers cannot be used.
    """
    folder = policy.client.state
    with ExitStack() as stack:
        for partition in policy.partitions:
            try:
                stack.enter_context(hold(folder / f"{partition.name}.claim"))
            except LockedError:
                continue
            except OSError as error:
                raise ConfigError(f"client.state: {folder}: {error.strerror} (is it the ledgers' volume?)") from error
            break
        else:
            raise ConfigError(
                f"partitions: all {len(policy.partitions)} are held by other clients (start fewer, or add partitions)"
            )
        yield policy.model_copy(update={"partitions": [partition]})
