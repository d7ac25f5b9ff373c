"""The Fleet API of a server that checks nothing: it hands out whatever it was given, and keeps what comes back."""

import queue
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from flwr.app import Message
from flwr.proto import fleet_pb2 as fleet
from flwr.proto import heartbeat_pb2 as heartbeat
from flwr.proto import message_pb2 as proto
from flwr.proto.fleet_pb2_grpc import FleetServicer, add_FleetServicer_to_server

from client.fleet import Inbound, Outbound, unpack

STILL_SECONDS = 120.0


@dataclass(kw_only=True)
class Sent:
    """A message as it goes over the wire."""

    message: proto.Message
    trees: list[proto.ObjectTree]
    objects: dict[str, bytes]

    @classmethod
    def whole(cls, packed: Outbound) -> "Sent":
        """One in which everything is as it should be."""
        return cls(
            message=proto.Message.FromString(packed.message),
            trees=[proto.ObjectTree.FromString(packed.tree)],
            objects=dict(packed.objects),
        )


@dataclass
class LyingFleet(FleetServicer):
    """One queue of messages and one of replies for each public key."""

    outbox: dict[bytes, deque[Sent | str]] = field(default_factory=dict)  # a text: PullMessages fails with it
    inbox: dict[bytes, "queue.Queue[Message]"] = field(default_factory=dict)
    joins: dict[bytes, int] = field(default_factory=dict)
    pulled: Counter[str] = field(default_factory=Counter)  # how often each object was asked for
    others: list[str] = field(default_factory=list)  # names of calls that no client of ours makes
    moving: threading.Event = field(default_factory=threading.Event)  # while it is clear, no call is answered
    _keys: list[bytes] = field(default_factory=list)
    _sent: dict[int, Sent] = field(default_factory=dict)
    _came: dict[str, tuple[bytes, proto.Message, dict[str, bytes], set[str]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.moving.set()

    def admit(self, key: bytes) -> None:
        self._keys.append(key)
        self.outbox[key], self.inbox[key], self.joins[key] = deque(), queue.Queue(), 0

    def ActivateNode(self, request: Any, _: Any) -> Any:
        self.joins[request.public_key] += 1
        return fleet.ActivateNodeResponse(node_id=1 + self._keys.index(request.public_key))

    def DeactivateNode(self, *_: Any) -> Any:
        self.moving.wait(STILL_SECONDS)
        return fleet.DeactivateNodeResponse()

    def SendNodeHeartbeat(self, *_: Any) -> Any:
        self.moving.wait(STILL_SECONDS)
        return heartbeat.SendNodeHeartbeatResponse(success=True)

    def PullMessages(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.moving.wait(STILL_SECONDS)
        box = self.outbox[self._keys[request.node.node_id - 1]]
        if not box:
            return fleet.PullMessagesResponse()
        sent = box.popleft()
        if isinstance(sent, str):
            return context.abort(grpc.StatusCode.INTERNAL, sent)
        self._sent[request.node.node_id] = sent
        return fleet.PullMessagesResponse(messages_list=[sent.message], message_object_trees=sent.trees)

    def PullObject(self, request: Any, _: Any) -> Any:
        self.pulled[request.object_id] += 1
        content = self._sent[request.node.node_id].objects.get(request.object_id)
        if content is None:
            return proto.PullObjectResponse(object_found=False)
        return proto.PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, *_: Any) -> Any:
        return proto.ConfirmMessageReceivedResponse()

    def PushMessages(self, request: Any, _: Any) -> Any:
        (message,), (tree,) = request.messages_list, request.message_object_trees
        names = set(_names(tree))
        key = self._keys[request.node.node_id - 1]
        session = f"{message.metadata.message_id}-{request.node.node_id}"
        self._came[session] = key, message, {}, names
        return fleet.PushMessagesResponse(objects_to_push=sorted(names), session_id=session)

    def PushObject(self, request: Any, _: Any) -> Any:
        key, message, objects, names = self._came[request.session_id]
        with self._lock:
            objects[request.object_id] = request.object_content
            if set(objects) == names:
                inbound = Inbound(run_id=0, message_id=message.metadata.message_id, envelope=b"", objects=dict(objects))
                self.inbox[key].put(unpack(inbound))
        return proto.PushObjectResponse(stored=True)

    def GetRun(self, _: Any, context: grpc.ServicerContext) -> Any:
        return self._other("GetRun", context)

    def GetFab(self, _: Any, context: grpc.ServicerContext) -> Any:
        return self._other("GetFab", context)

    def RegisterNode(self, _: Any, context: grpc.ServicerContext) -> Any:
        return self._other("RegisterNode", context)

    def UnregisterNode(self, _: Any, context: grpc.ServicerContext) -> Any:
        return self._other("UnregisterNode", context)

    def _other(self, name: str, context: grpc.ServicerContext) -> Any:
        self.others.append(name)
        return context.abort(grpc.StatusCode.UNIMPLEMENTED, "")


def _names(tree: proto.ObjectTree) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _names(child)


@contextmanager
def serving(servicer: LyingFleet, address: str, pki: Path) -> Iterator[None]:
    """Serves it at the address with the federation's own certificate."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_FleetServicer_to_server(servicer, server)
    pair = (pki / "server/server.key").read_bytes(), (pki / "server/server.crt").read_bytes()
    server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield
    finally:
        server.stop(grace=None).wait(10)
