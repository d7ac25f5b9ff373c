"""`python -m tests.hostile.broken --policy FILE`: a client with two holes, to show that the tests would see them.

It takes any number of steps, and it reads the records before it has looked at the request.
"""

import sys
from typing import Any

from client import zygote
from client.__main__ import main

_preload = zygote._preload


def preload(task: str) -> None:
    """What the zygote does once it has imported the client's code, and then spoils it."""
    from client import app, policy

    train_round = app.train_round

    def accept_all(proposal: Any, terms: Any) -> Any:
        return policy._release(terms.privacy, proposal.steps)

    def read_first(content: Any, message_id: str, bench: Any, partition: Any, budget: Any) -> Any:
        bench.data(partition, app.pick_device("cpu"))
        return train_round(content, message_id, bench, partition, budget)

    vars(app).update(accept=accept_all, train_round=read_first)
    _preload(task)


if __name__ == "__main__":
    zygote._preload = preload
    sys.exit(main())
