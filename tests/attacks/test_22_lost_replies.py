"""Attack: the network loses, delays or doubles what client and server say, so that a round is trained or sold twice.

What holds: for one message there is one charge and one release, however often it must be sent; a reply that never
arrives stays paid, and whoever asks again under another name pays again, for other noise.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from flwr.app import Message

from client.fleet import pack
from tests.attacks.relay import Relay
from tests.attacks.site import Site, moved, question, refusal, site
from tests.federation import wait_for
from tests.hostile.fleet import LyingFleet, Sent

PARTITION = 0
LATE_SECONDS = 6.0  # the client of these tests gives a call 2 s, so that they need not wait a minute


class Faulty(LyingFleet):
    """Calls `before[name]` or `after[name]` once, around the next call of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], bool]] = {}  # stays until it says that it was the moment
        self.pushes = 0

    def PushMessages(self, request: Any, context: Any) -> Any:
        self.pushes += 1
        self.before.pop("PushMessages", lambda: None)()
        return super().PushMessages(request, context)

    def PushObject(self, request: Any, context: Any) -> Any:
        response = super().PushObject(request, context)
        if (fault := self.after.get("PushObject")) and fault():
            del self.after["PushObject"]
        return response


@pytest.fixture
def wire(tmp_path: Any) -> Iterator[tuple[Site, Relay]]:
    with site(tmp_path, clients=2, fleet=Faulty()) as made, closing(Relay(made.port)) as relay:
        made.run.policy_content["client"]["server_address"] = relay.address
        made.run.configure()
        yield made, relay


def ask(owner: Site, replies: int = 1) -> list[Message]:
    """Sends one message, and returns as many replies to it, all that come."""
    sent = Sent.whole(pack(question()))
    owner.tell(PARTITION, sent)
    heard = []
    for _ in range(replies):
        reply = owner.hear(PARTITION)
        assert reply is not None, owner.run.log("client")
        assert reply.metadata.reply_to_message_id == sent.message.metadata.message_id
        heard.append(reply)
    assert owner.hear(PARTITION, 1.5) is None, "one reply too many"
    return heard


def releases(replies: list[Message]) -> int:
    """How many different updates these replies to one message carry."""
    return len({moved(reply).tobytes() for reply in replies})


def acknowledgement_lost(owner: Site, relay: Relay) -> None:
    """The server has all of the update, and the client does not know."""

    def fault() -> bool:
        if owner.fleet.inbox[owner._public[PARTITION]].empty():
            return False
        relay.cut()
        return True

    owner.fleet.after["PushObject"] = fault  # type: ignore[attr-defined]


def test_one_message_is_one_charge_and_one_release(wire: tuple[Site, Relay]) -> None:
    owner, relay = wire
    fleet: Any = owner.fleet
    owner.start(variant="impatient")

    def charges() -> tuple[int, int]:
        account = owner.account(PARTITION)
        return len(account.messages), account.commits

    # Nothing is wrong with the wire.
    assert releases(ask(owner)) == 1
    assert charges() == (1, 1)

    # The reply is cut off on its way.
    fleet.before["PushMessages"] = relay.cut
    assert releases(ask(owner)) == 1
    assert (charges(), fleet.pushes) == ((2, 2), 3)

    # It has arrived, and only that is lost: it comes twice, and is the same.
    acknowledgement_lost(owner, relay)
    assert releases(ask(owner, replies=2)) == 1
    assert charges() == (3, 3)

    # The server takes it too late: the client has given up the call, and sends it again.
    fleet.before["PushMessages"] = lambda: time.sleep(LATE_SECONDS)
    before = fleet.pushes
    assert releases(ask(owner)) == 1
    assert charges() == (4, 4)
    assert fleet.pushes > before + 1

    # The message itself comes twice: the second is refused.
    packed = pack(question())
    for _ in range(2):
        owner.tell(PARTITION, Sent.whole(packed))
    first, second = owner.hear(PARTITION), owner.hear(PARTITION)
    assert first is not None
    assert second is not None
    kept = moved(first)
    assert refusal(second) == "duplicate"
    assert charges() == (5, 5)

    # It is lost for good: paid it stays, and the same message buys nothing any more.
    spent = owner.account(PARTITION).epsilon_spent
    packed = pack(question())
    fleet.before["PushMessages"] = lambda: (setattr(relay, "dead", True), relay.cut())[1]
    owner.tell(PARTITION, Sent.whole(packed))
    wait_for(lambda: "a reply is given up" in owner.run.log("client"), "the client to give up", 90)
    relay.dead = False
    assert owner.account(PARTITION).epsilon_spent > spent
    assert charges() == (6, 6)
    owner.tell(PARTITION, Sent.whole(packed))
    again = owner.hear(PARTITION)
    assert again is not None
    assert refusal(again) == "duplicate"
    assert charges() == (6, 6)
    (reply,) = ask(owner)
    assert charges() == (7, 7)
    assert (moved(reply) != kept).all()  # another release has other noise


def test_a_client_that_trains_again_is_caught(wire: tuple[Site, Relay]) -> None:
    owner, relay = wire
    owner.start(variant="retrains")
    acknowledgement_lost(owner, relay)
    assert releases(ask(owner, replies=2)) == 2
    assert owner.account(PARTITION).commits == 2
