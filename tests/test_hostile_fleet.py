"""Messages that no SuperLink would pass on: an error reply or none, no charge, and the client lives on."""

import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Array, ArrayRecord, Message, Metadata
from flwr.proto import message_pb2 as proto
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.fleet import pack
from common.messages import REFUSAL, Proposal, request
from tests.federation import Federation, federation, wait_for
from tests.hostile.fleet import LyingFleet, Sent, serving
from tests.hostile.liar import TASK, weights

VICTIM, OTHER = 0, 1  # partitions of one client
QUIET_SECONDS = 1.5  # in which a message that is not answered would have been


class Wire:
    """A client and the server that lies to it."""

    def __init__(self, run: Federation, fleet: LyingFleet) -> None:
        self.run, self.fleet = run, fleet
        self.keys = [public_key(run.folder / f"state/pki/public/clients/{name}.pub") for name in run.partitions]
        for key in self.keys:
            fleet.admit(key)

    def tell(self, partition: int, sent: Sent | str) -> None:
        self.fleet.outbox[self.keys[partition]].append(sent)

    def hear(self, partition: int, seconds: float = 60.0) -> Message | None:
        try:
            return self.fleet.inbox[self.keys[partition]].get(timeout=seconds)
        except queue.Empty:
            return None

    def alive(self) -> None:
        """Asserts that both partitions answer a request, here one for another task."""
        for partition in (VICTIM, OTHER):
            self.tell(partition, Sent.whole(pack(question(task="another"))))
        for partition in (VICTIM, OTHER):
            reply = self.hear(partition)
            assert reply is not None, self.run.log("client")
            assert reply.content[REFUSAL]["reason"] == "policy"

    def sequences(self) -> list[int]:
        return [self.run.account(name).sequence for name in self.run.partitions]

    def records_read(self) -> int:
        return len((self.run.folder / "data/records-read").read_text())


def public_key(path: Path) -> bytes:
    return public_key_to_bytes(load_ssh_public_key(path.read_bytes()))  # type: ignore[arg-type]


def question(arrays: ArrayRecord | None = None, **changes: Any) -> Message:
    """An honest request with some keys of its proposal changed."""
    proposal = Proposal(task=TASK, round=1, steps=2, learning_rate=16.0, anchor_sequence=0, anchor_head="")
    arrays = arrays or ArrayRecord({name: Array(weight) for name, weight in weights().items()})
    content = request(arrays, Proposal(**asdict(proposal) | changes))
    metadata = Metadata(
        run_id=1, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="", group_id="1",
        created_at=time.time(), ttl=600.0, message_type="train",
    )  # fmt: skip
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with federation(tmp_path_factory.mktemp("fleet")) as run:
        (run.folder / "data").mkdir()
        (run.folder / "data/records-read").touch()
        run.policy_content["task"] = TASK
        run.configure()
        fleet = LyingFleet()
        wire = Wire(run, fleet)
        with serving(fleet, run.fleet, run.folder / "state/pki"):
            client = run.start_client()
            wait_for(lambda: run.log("client").count(": connected\n") == 2, "the client to connect", 120)
            yield wire
            assert client.poll() is None, run.log("client")
            assert fleet.others == []


# Each takes an honest message apart, and says whether an error is replied.


def random_bytes(sent: Sent) -> bool:
    sent.objects = {name: os.urandom(2000) for name in sent.objects}
    return True


def no_bytes(sent: Sent) -> bool:
    sent.objects[sent.message.metadata.message_id] = b" \0"
    return True


def truncated(sent: Sent) -> bool:
    sent.objects = {name: content[:-7] for name, content in sent.objects.items()}
    return True


def object_missing(sent: Sent) -> bool:
    del sent.objects[min(sent.objects)]
    return False


def all_missing(sent: Sent) -> bool:
    sent.objects = {}
    return False


def no_tree(sent: Sent) -> bool:
    sent.trees = []
    return False


def tree_without_children(sent: Sent) -> bool:
    del sent.trees[0].children[:]
    return True


def tree_of_another(sent: Sent) -> bool:
    sent.objects = {get_object_id(content + b"."): content for content in sent.objects.values()}
    sent.trees = [proto.ObjectTree(object_id=name) for name in sent.objects]
    return True


def cycle(sent: Sent) -> bool:
    root, other = sent.message.metadata.message_id, "f" * 64
    sent.objects = {root: b"Message %s 0\0" % other.encode(), other: b"RecordDict %s 0\0" % root.encode()}
    sent.trees = [proto.ObjectTree(object_id=root, children=[proto.ObjectTree(object_id=other)])]
    return True


def its_own_child(sent: Sent) -> bool:
    root = sent.message.metadata.message_id
    sent.objects = {root: b"Message %s 0\0" % root.encode()}
    sent.trees = [proto.ObjectTree(object_id=root)]
    return True


def long_chain(sent: Sent) -> bool:
    """Deeper than Python's stack, in a tree that is flat."""
    names = [sent.message.metadata.message_id, *(f"{number:064x}" for number in range(3000))]
    sent.objects = {
        name: b"RecordDict %s 2\0{}" % child.encode() for name, child in zip(names, [*names[1:], ""], strict=True)
    }
    sent.trees = [proto.ObjectTree(object_id=names[0], children=[proto.ObjectTree(object_id=n) for n in names[1:]])]
    return True


def not_a_message(sent: Sent) -> bool:
    (child,) = sent.trees[0].children
    sent.objects[sent.message.metadata.message_id] = sent.objects[child.object_id]
    return True


def unknown_class(sent: Sent) -> bool:
    root = sent.message.metadata.message_id
    sent.objects[root] = sent.objects[root].replace(b"Message", b"os.system", 1)
    return True


def chunk_beyond(sent: Sent) -> bool:
    for name, content in sent.objects.items():
        sent.objects[name] = content.replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [7]')
    return True


def names_no_hash(sent: Sent) -> bool:
    sent.message.metadata.message_id = "../" * 10_000 + "\x1b[2J\n"
    return False


def nameless(sent: Sent) -> bool:
    sent.message.metadata.message_id = ""
    return False


def rubbish_in_the_envelope(sent: Sent) -> bool:
    """What is not for parsing is not parsed, neither when the message is whole nor when it is not."""
    item = sent.message.content.items.add()
    item.key, item.array_record.items.add().value.data = "arrays", os.urandom(100)
    sent.message.error.code = 7
    return random_bytes(sent)


def odd_times(sent: Sent) -> bool:
    sent.message.metadata.created_at, sent.message.metadata.ttl = float("nan"), float("-inf")
    return random_bytes(sent)


LIES = (
    random_bytes, no_bytes, truncated, object_missing, all_missing, no_tree, tree_without_children, tree_of_another,
    cycle, its_own_child, long_chain, not_a_message, unknown_class, chunk_beyond, names_no_hash, nameless,
    rubbish_in_the_envelope, odd_times,
)  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_malformed_message_costs_nothing_and_ends_nothing(wire: Wire, lie: Callable[[Sent], bool]) -> None:
    before, read, joins = wire.sequences(), wire.records_read(), dict(wire.fleet.joins)
    sent = Sent.whole(pack(question()))
    answered = lie(sent)
    wire.tell(VICTIM, sent)
    reply = wire.hear(VICTIM, 60 if answered else QUIET_SECONDS)
    assert (reply is not None) == answered, reply or wire.run.log("client")
    if reply is not None:
        assert reply.has_error()
        assert str(wire.run.folder) not in str(reply.error.reason)
    wire.alive()
    assert (wire.sequences(), wire.records_read()) == (before, read)
    assert wire.fleet.joins == joins, "a partition had to join again"


def test_what_partitions_are_all_sent_is_pulled_once_and_never_under_a_false_name(wire: Wire) -> None:
    arrays = ArrayRecord({name: Array(weight + 0.125) for name, weight in weights().items()})
    packed = [pack(question(arrays, task="another")) for _ in range(4)]
    shared = set.intersection(*(set(each.objects) for each in packed))
    shared -= set(wire.fleet.pulled)  # what other tests had sent may still be kept
    assert len(shared) >= 2

    false = Sent.whole(packed[0])  # under the names of what the other is sent next
    false.objects |= {name: false.objects[name][:-1] + b"!" for name in shared}
    wire.tell(VICTIM, false)
    reply = wire.hear(VICTIM)
    assert reply is not None
    assert reply.has_error()
    for partition, sent in ((OTHER, packed[1]), (VICTIM, packed[2]), (OTHER, packed[3])):
        wire.tell(partition, Sent.whole(sent))
        reply = wire.hear(partition)
        assert reply is not None
        assert reply.content[REFUSAL]["reason"] == "policy"
    assert {wire.fleet.pulled[name] for name in shared} == {2}  # the false one, and a true one for all three


def test_an_error_of_the_servers_is_one_clean_line(wire: Wire) -> None:
    said = len(wire.run.log("client"))
    joins = wire.fleet.joins[wire.keys[VICTIM]]
    wire.tell(VICTIM, "first\n\x1b[31msecond " + "x" * 5000)
    wait_for(lambda: wire.fleet.joins[wire.keys[VICTIM]] == joins + 1, "the partition to join again", 30)
    wire.alive()
    lines = wire.run.log("client")[said:].splitlines()
    (line,) = [line for line in lines if "not connected" in line]
    assert "internal: first [31msecond x" in line
    assert len(line) < 500


def test_a_worker_that_dies_is_an_error_reply_and_the_charge_stays(wire: Wire) -> None:
    """Before any other test has made a worker load the records, which is when this one dies."""
    before = wire.sequences()
    (wire.run.folder / "data/die").touch()
    wire.tell(VICTIM, Sent.whole(pack(question())))
    reply = wire.hear(VICTIM)
    (wire.run.folder / "data/die").unlink()
    assert reply is not None, wire.run.log("client")
    assert reply.error.reason == "the worker died"
    assert wire.sequences() == [before[VICTIM] + 1, before[OTHER]]
    wire.alive()


def test_the_client_has_lived_through_all_of_it(wire: Wire) -> None:
    log = wire.run.log("client")
    assert "Traceback" not in log
    assert "an error of ours" not in log
    assert log.count("the worker died") == 1  # the one that was made to
    wire.alive()
