"""`python -m tests.attacks.holes NAME ... --policy PATH`: the client with guards of its ledger taken out.

For negative controls. They change the host, in which the ledgers are; torch is not to be imported before the fork.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from client.__main__ import main
from client.ledger import Account, Ledger, chain, create, writer


def lenient(raw: bytes, source: Path) -> list[chain.Entry]:
    """The lines that are JSON, whatever their hashes say."""
    entries: list[chain.Entry] = []
    for line in raw.splitlines():
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(line)
            known = {name: content.pop(name) for name in ("time", "kind", "prev", "hash")}
            content.pop("sequence")
            entries.append(chain.Entry(sequence=len(entries) + 1, body=content, **known))
    if not entries:
        raise chain.ChainError(f"{source}: empty")
    return entries


def careless() -> None:
    """Reads whatever is there, makes what is missing, forgets its messages, pays late, and begins with each run."""
    from client.conversation import Conversation
    from client.member import Member

    open_ledger, serve = Ledger.open.__func__, Member._serve  # type: ignore[attr-defined]
    runs: dict[str, int] = {}
    asked: dict[Conversation, Any] = {}

    def open_anyhow(cls: Any, path: Path, *, partition: str, privacy: Any, anchor: Any = None) -> Any:
        if not path.exists():
            create(path, partition=partition, privacy=privacy)
        return open_ledger(cls, path, partition=partition, privacy=privacy, anchor=anchor)

    def commit_anyhow(self: Any, _: chain.Entry, *, reservation: int, **_data: str) -> None:
        self.open.pop(reservation, None)
        self.commits += 1

    def serve_run(self: Any, inbound: Any, stop: Any) -> None:
        name = self.partition.name
        if runs.setdefault(name, inbound.run_id) != inbound.run_id:
            runs[name] = inbound.run_id
            self._ledger.close()
            self._policy.ledger_path(name).unlink()
            self._open_ledger()
        serve(self, inbound, stop)

    def reserve_later(self: Any, *charge: Any) -> None:
        asked[self] = charge

    def reserve_and_commit(self: Any, data: str) -> Any:
        self._reservation = self.ledger.reserve(*asked.pop(self)[:2])
        return commit(self, data)

    commit = Conversation._commit
    chain.decode = lenient
    writer._read_anchor = lambda _: None
    Account.messages = property(lambda _: set(), lambda *_: None)  # type: ignore[assignment]
    Account._apply_commit = commit_anyhow  # type: ignore[method-assign]
    Ledger.open = classmethod(open_anyhow)  # type: ignore[assignment]
    Ledger.require_head = lambda *_: None  # type: ignore[method-assign]
    Member._serve = serve_run  # type: ignore[method-assign]
    Conversation._reserve, Conversation._commit = reserve_later, reserve_and_commit  # type: ignore[method-assign]


def slow_to_send() -> None:
    """The client as it is, but its second partition's updates wait before they are sent while `hold-send` is there."""
    import time

    from client.member import Member

    send = Member._send

    def held(self: Any, *arguments: Any) -> None:
        if self.partition == self._policy.partitions[1]:
            Path("sending").touch()
            while Path("hold-send").exists():
                time.sleep(0.02)
        send(self, *arguments)

    Member._send = held  # type: ignore[method-assign]


def slow_to_send_and_blind() -> None:
    """The same, and it does not notice what others write into its ledger."""
    slow_to_send()
    chain.Chain.check = lambda _: None  # type: ignore[method-assign]


def without_a_lock() -> None:
    """The client as it is, on a volume whose locks bind nobody."""
    chain.fcntl.flock = lambda *_: None  # type: ignore[attr-defined]


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.exit(main(sys.argv[sys.argv.index("--policy") :]))
