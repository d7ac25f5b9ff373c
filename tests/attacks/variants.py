"""`python -m tests.attacks.variants NAME --policy PATH`: the client with one guard taken out, for negative controls.

Each is a function here. They change the host, or what a worker inherits; torch is not to be imported before the fork.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
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


def impatient() -> None:
    """The client as it is, but for the seconds that it gives a call."""
    from client.fleet import Node

    Node._call.__defaults__ = (2.0,)


def eager() -> None:
    """The client as it is, but for the seconds that it waits before it tries again."""
    from client import fleet, member

    vars(member)["BACK_OFF_SECONDS"] = (0.2, 0.5)
    vars(fleet)["MAX_RECONNECT_MS"] = 300


def retrains() -> None:
    """Trains again, for another charge, where a reply did not go through."""
    from client.fleet import FleetError
    from client.ledger import Ledger
    from client.member import Member

    impatient()
    reserve, serve = Ledger.reserve, Member._serve
    jobs: dict[Any, Any] = {}

    def reserve_anew(self: Any, message: str, release: Any, **more: Any) -> int:
        return reserve(self, message + os.urandom(8).hex(), release, **more)

    def serve_noted(self: Any, inbound: Any, stop: Any) -> None:
        jobs[self] = inbound
        serve(self, inbound, stop)

    def send(self: Any, outbound: Any, seconds: float, _: Any, stop: Any) -> None:
        try:
            self._node.send(outbound, seconds)
        except FleetError:
            if not stop.wait(1.0):
                serve(self, jobs[self], stop)

    Ledger.reserve, Member._serve, Member._send = reserve_anew, serve_noted, send  # type: ignore[method-assign]


def clocked() -> None:
    """Its clock is as many seconds off as the file `clock` says, at this moment."""
    import flwr.supercore.date
    import grpc._channel

    from client import fleet
    from client.ledger import chain

    true = time.time
    # gRPC's core reads the machine's own clock, which is right here, so its Python half must read it too.
    vars(grpc._channel)["time"] = SimpleNamespace(**vars(time))

    def off() -> float:
        try:
            return float(Path("clock").read_text() or 0)
        except FileNotFoundError:
            return 0.0

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(true() + off(), tz)

    time.time = lambda: true() + off()
    time.time_ns = lambda: int(1e9 * (true() + off()))
    vars(chain)["datetime"] = Clock
    for module in (fleet, flwr.supercore.date):
        vars(module)["now"] = lambda: Clock.now(UTC)


def forgives_the_future() -> None:
    """Counts no charge of a later time than the clock's: one of many mistakes that trust a clock."""
    clocked()
    from client.ledger import chain
    from client.ledger.account import Account

    apply = Account._apply_reserve

    def counted(self: Any, entry: Any, **body: Any) -> None:
        before = dict(self._charged)
        apply(self, entry, **body)
        if datetime.fromisoformat(entry.time) > chain.datetime.now(UTC):
            self._charged = before

    Account._apply_reserve = counted  # type: ignore[method-assign]


def trusts_its_disk() -> None:
    """Goes on where the ledger cannot be written."""
    from client.ledger import chain

    def append(self: Any, kind: str, body: Any) -> Any:
        entry = chain.Entry.after(self.entries[-1], kind, body)
        with suppress(OSError):
            os.write(self._fd, entry.encode())
            os.fsync(self._fd)
        self.entries.append(entry)
        return entry

    chain.Chain.append, chain.Chain.check = append, lambda _: None  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    sys.exit(main())
