"""`python -m tests.hostile.broken --policy FILE`: a client with three holes, to show that the tests would see them.

It takes any number of steps and any learning rate, it passes over keys that it does not know, and it reads the records
before it has looked at the request.
"""

import sys
from typing import Any

from client import zygote
from client.__main__ import main

_preload = zygote._preload


def preload(task: str) -> None:
    """What the zygote does once it has imported the client's code, and then spoils it."""
    from flwr.app import ConfigRecord

    from client import app, policy
    from common.messages import Proposal

    train_round, strict = app.train_round, Proposal.from_record

    def accept_all(proposal: Any, terms: Any) -> Any:
        return policy._release(terms.privacy, proposal.steps)

    def read_first(content: Any, message_id: str, bench: Any, partition: Any, budget: Any) -> Any:
        bench.data(partition, app.pick_device("cpu"))
        return train_round(content, message_id, bench, partition, budget)

    def from_record(record: Any) -> Proposal:
        known = {key: record[key] for key in record if key in Proposal.__dataclass_fields__}
        return strict(ConfigRecord(known))

    Proposal.from_record = from_record  # type: ignore[method-assign]
    vars(app).update(accept=accept_all, train_round=read_first)
    _preload(task)


if __name__ == "__main__":
    zygote._preload = preload
    sys.exit(main())
