"""Attack: the server sends one message twice, at once, after a restart, and with another content under its name.

What holds: one charge and one release; each repetition is refused and reads no record.
"""

import time

import pytest
from flwr.app import Message

from client.fleet import pack
from common.messages import ARRAYS, REFUSAL, STANDING, STATEMENT
from tests.attacks.owner import Owner, Part
from tests.attacks.site import question, refusal
from tests.hostile.fleet import Sent


def told(owner: Owner, sent: Sent) -> Message:
    owner.site.tell(Part.TWICE, sent)
    reply = owner.site.hear(Part.TWICE)
    assert reply is not None, owner.log()
    return reply


def repeats(owner: Owner) -> None:
    """One message in all its repetitions."""
    before = owner.site.account(Part.TWICE)
    sent = Sent.whole(pack(question()))
    owner.site.tell(Part.TWICE, sent)
    owner.site.tell(Part.TWICE, sent)
    first, second = (owner.site.hear(Part.TWICE) for _ in range(2))
    assert first is not None
    assert second is not None
    assert ARRAYS in first.content
    assert first.content[STANDING]["ledger_sequence"] == before.sequence + 2
    assert refusal(second) == "duplicate", "released twice"
    assert set(second.content) == {REFUSAL, STANDING, STATEMENT}

    other = Sent.whole(pack(question(steps=1)))  # another content under the name that was charged
    root = sent.message.metadata.message_id
    other.objects[root] = other.objects.pop(other.message.metadata.message_id)
    other.trees[0].object_id = other.message.metadata.message_id = root
    assert refusal(told(owner, other)) == "duplicate"

    read = owner.records_read()
    owner.restart()
    for repeated in (sent, other):
        assert refusal(told(owner, repeated)) == "duplicate", "released again after a restart"
    after = owner.site.account(Part.TWICE)
    assert (after.sequence, after.commits) == (before.sequence + 3, before.commits + 1)  # and the line of the restart
    assert owner.records_read() == read


def test_one_message_is_one_charge_and_one_release(honest: Owner) -> None:
    repeats(honest)


def test_two_messages_are_two_charges(honest: Owner) -> None:
    """So that the test above does not pass because nothing is ever charged twice."""
    before = honest.site.account(Part.TWICE)
    for _ in range(2):
        time.sleep(0.01)  # their times differ, and so do their names
        assert ARRAYS in told(honest, Sent.whole(pack(question()))).content
    assert honest.site.account(Part.TWICE).sequence == before.sequence + 4


def test_a_client_that_forgets_its_messages_is_seen(careless: Owner) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="released twice"):
        repeats(careless)
