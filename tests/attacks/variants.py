"""`python -m tests.attacks.variants NAME --policy PATH`: the client with one guard taken out, for negative controls.

Each is a function here. They change the host, or what a worker inherits; torch is not to be imported before the fork.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from client.__main__ import main


def second_budget() -> None:
    """Does not look at what the owner's other ledgers were charged for."""
    from client.ledger import writer

    @contextmanager
    def unclaimed(*_: Any) -> Iterator[None]:
        yield

    vars(writer)["claim"] = unclaimed


def verbose() -> None:
    """The client as it is, with every logger at its most talkative."""
    from client import __main__

    start = __main__.start_logging

    def start_all() -> None:
        start()
        logging.getLogger().setLevel(logging.DEBUG)
        for name in ("flwr", "client", "common", "torch", "opacus"):
            logging.getLogger(name).setLevel(logging.DEBUG)

    vars(__main__)["start_logging"] = start_all


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    sys.exit(main())
