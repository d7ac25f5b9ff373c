"""The Fleet API over gRPC and TLS: the only file that knows Flower's private modules.

One channel carries all partitions of the process; each call is signed with its partition's own key, as Flower's
SuperNode does. The server's app bundle (FAB) is never asked for. `unpack` and `pack` run in workers, which open no
channel: a message is parsed in a process that may die without harm.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

import grpc
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    ErrorCode,
)
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2 as fleet
from flwr.proto import message_pb2 as proto
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    is_valid_sha256_hash,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from client.objects import Objects
from client.reach import is_loopback, why_not
from common.certificates import PkiError, load_certificate, load_key

HEARTBEATS_PER_SECOND = 20.0  # of a process at most: each costs the server milliseconds
CALL_SECONDS = 60.0
HEARTBEAT_CALL_SECONDS = 5.0  # one thread does it for all partitions
OBJECT_SECONDS = 120.0  # for the server to have an object that it announced
MAX_OBJECT_BYTES = 2**26  # Flower cuts arrays into objects of 5 MB
MAX_RECONNECT_MS = 5_000  # gRPC's own is two minutes, in which a server that is back is not seen
MAX_TEXT = 300
CLIENT_APP_CRASHED = int(ErrorCode.CLIENT_APP_CRASHED)


class FleetError(Exception):
    """A call failed. One line; `retry` says whether the same call may go through later."""

    def __init__(self, text: str, *, retry: bool) -> None:
        super().__init__(text)
        self.retry = retry


class BrokenMessage(Exception):
    """The server announced a message that cannot be had whole. Nothing else is wrong with the connection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inbound:
    """A message from the server as it came: nothing in it has been parsed."""

    run_id: int
    message_id: str
    envelope: bytes  # the message without its content
    group: str = ""  # the server's name for what it sends at the same time: a round
    objects: dict[str, bytes]  # object id -> content


@dataclass(frozen=True, kw_only=True, slots=True)
class Outbound:
    """A reply, ready to be sent."""

    run_id: int
    message: bytes
    tree: bytes
    objects: dict[str, bytes]


def unpack(inbound: Inbound) -> Message:
    """The message in `inbound`. Raises whatever a malformed one makes Flower raise."""
    message = inflate_object_from_contents(inbound.message_id, dict(inbound.objects))
    if not isinstance(message, Message):
        raise TypeError(f"expected a Message, found {type(message).__name__}")
    message.metadata.__dict__["_message_id"] = inbound.message_id
    return message


def pack(reply: Message) -> Outbound:
    """The wire form of a reply."""
    with no_object_id_recompute():  # each part is hashed once
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return Outbound(
            run_id=reply.metadata.run_id,
            message=message_to_proto(remove_content_from_message(reply)).SerializeToString(),
            tree=get_object_tree(reply).SerializeToString(),
            objects={key: part.deflate() for key, part in get_all_nested_objects(reply).items()},
        )


def failure(inbound: Inbound, reason: str) -> Outbound:
    """An error reply to a message whose content was never parsed."""
    envelope = proto.Message(metadata=proto.Message.FromString(inbound.envelope).metadata)
    envelope.content.SetInParent()
    reply_to = message_from_proto(envelope)
    return pack(Message(Error(code=CLIENT_APP_CRASHED, reason=reason), reply_to=reply_to))


_REFUSED = (
    "register it with the server; one that is registered is refused while another live client uses it,"
    " and for up to a minute after one that was killed; the clocks must agree"
)


def heartbeat_seconds(partitions: int) -> float:
    """Between two heartbeats of a partition, in a process with so many."""
    return max(HEARTBEAT_DEFAULT_INTERVAL / 2, partitions / HEARTBEATS_PER_SECOND)


class Fleet:
    """The channel to one server."""

    def __init__(self, address: str, ca_certificate: Path, *, kept_bytes: int = 0) -> None:
        """Opens no connection yet. `kept_bytes` is for objects that came for one partition and may serve another.

        Raises OSError, or PkiError, if the CA's certificate cannot be used.
        """
        self.address = address
        self.objects = Objects(kept_bytes)
        self._ca = ca_certificate
        load_certificate(ca_certificate)  # gRPC would take anything, and then refuse every server
        options: list[tuple[str, Any]] = [
            *((f"grpc.max_{way}_message_length", MAX_OBJECT_BYTES) for way in ("send", "receive")),
            ("grpc.keepalive_time_ms", 210_000),
            ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
        ]
        if is_loopback(address):
            options.append(("grpc.enable_http_proxy", 0))  # gRPC would ask the proxy even for 127.0.0.1
        credentials = grpc.ssl_channel_credentials(ca_certificate.read_bytes())
        self._channel = grpc.secure_channel(address, credentials, options=options)
        self.stub = FleetStub(self._channel)
        self._explaining = threading.Lock()
        self._explained = float("-inf"), ""  # when, and what

    def close(self) -> None:
        self._channel.close()

    def explain(self) -> str:
        """Why the server cannot be reached: one line for a person, not older than a second.

        Many partitions lose a server at the same moment, and each asks.
        """
        with self._explaining:
            when, text = self._explained
            if time.monotonic() - when > 1.0:
                text = why_not(self.address, self._ca)
                self._explained = time.monotonic(), text
            return text


class Node:
    """One partition's place in the fleet, proven by its key in every call."""

    def __init__(
        self, fleet_: Fleet, key_path: Path, max_message_bytes: int, *, heartbeat_seconds: float | None = None
    ) -> None:
        self._fleet = fleet_
        # What the server is told: it waits twice as long.
        self._interval = 2 * heartbeat_seconds if heartbeat_seconds else HEARTBEAT_DEFAULT_INTERVAL
        self._max_message_bytes = max_message_bytes  # of one message with all its objects
        self._key_path = key_path
        self._key: ec.EllipticCurvePrivateKey | None = None
        self._node: NodeProto | None = None

    def load_key(self) -> ec.EllipticCurvePrivateKey:
        """The partition's key, read once. Raises FleetError when it is missing or none that Flower takes."""
        if self._key is None:
            try:
                self._key = load_key(self._key_path)
            except OSError as error:
                text = f"{self._key_path}: {error.strerror} (it is the partition's key: put it there)"
                raise FleetError(text, retry=False) from None
            except (PkiError, UnsupportedAlgorithm) as error:
                raise FleetError(str(error), retry=False) from None
        return self._key

    @property
    def active(self) -> bool:
        return self._node is not None

    def activate(self) -> None:
        """Joins the fleet. Refused while the key is not registered, or another live node holds it."""
        public = public_key_to_bytes(self.load_key().public_key())
        request = fleet.ActivateNodeRequest(public_key=public, heartbeat_interval=self._interval)
        try:
            response = self._call(self._fleet.stub.ActivateNode, request)
        except FleetError as error:
            if error.retry:
                raise
            raise FleetError(f"the server refuses {self._key_path}: {error} ({_REFUSED})", retry=False) from None
        self._node = NodeProto(node_id=response.node_id)

    def deactivate(self) -> None:
        node, self._node = self._node, None
        if node is not None:
            self._call(self._fleet.stub.DeactivateNode, fleet.DeactivateNodeRequest(node_id=node.node_id))

    def lost(self) -> None:
        """The server does not know this node any more."""
        self._node = None

    def heartbeat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._interval)
        if not self._call(self._fleet.stub.SendNodeHeartbeat, request, HEARTBEAT_CALL_SECONDS).success:
            raise FleetError("the server does not know this node", retry=True)

    def receive(self) -> Inbound | None:
        """The next message with all its objects, or None.

        Raises:
            FleetError: the server cannot be reached, or does not know this node.
            BrokenMessage: only this message is lost: its run ended meanwhile, or the server is not honest.
        """
        response = self._call(self._fleet.stub.PullMessages, fleet.PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        message = response.messages_list[0]
        metadata = message.metadata
        if not response.message_object_trees or not is_valid_sha256_hash(metadata.message_id):
            raise BrokenMessage("it has no tree of objects, or no hash for a name")  # the name goes into the ledger
        confirm = proto.ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        try:
            objects, left = dict[str, bytes](), self._max_message_bytes
            for tree in iterate_object_tree(response.message_object_trees[0]):
                pull = self._pull if tree.object_id == metadata.message_id else self._shared  # its head is its own
                objects[tree.object_id] = pull(metadata.run_id, tree.object_id)
                left -= len(tree.object_id) + len(objects[tree.object_id])
                if left < 0:
                    raise BrokenMessage(f"it has over {self._max_message_bytes} bytes (client.max_message_bytes)")
            self._call(self._fleet.stub.ConfirmMessageReceived, confirm)
        except FleetError as error:
            if error.retry:
                raise
            raise BrokenMessage(str(error)) from None
        return Inbound(
            run_id=metadata.run_id,
            message_id=metadata.message_id,
            envelope=message.SerializeToString(),
            group=_line(metadata.group_id),
            objects=objects,
        )

    def send(self, outbound: Outbound, seconds: float) -> None:
        """Sends a reply; `seconds` is what the work took."""
        request = fleet.PushMessagesRequest(
            node=self._node,
            messages_list=[proto.Message.FromString(outbound.message)],
            message_object_trees=[proto.ObjectTree.FromString(outbound.tree)],
            clientapp_runtime_list=[seconds],
        )
        response = self._call(self._fleet.stub.PushMessages, request)
        for object_id in response.objects_to_push:
            push = proto.PushObjectRequest(
                node=self._node, run_id=outbound.run_id, object_id=object_id,
                object_content=outbound.objects[object_id], session_id=response.session_id,
            )  # fmt: skip
            if not self._call(self._fleet.stub.PushObject, push).stored:
                raise FleetError(f"the server did not store object {object_id}", retry=False)

    def _shared(self, run_id: int, object_id: str) -> bytes:
        """What the server has under this name. Many partitions are sent the same model: it is pulled once."""
        with self._fleet.objects.pulled_once(object_id):
            content = self._fleet.objects.get(object_id)
            if content is None:
                content = self._pull(run_id, object_id)
                self._fleet.objects.keep(object_id, content)
        return content

    def _pull(self, run_id: int, object_id: str) -> bytes:
        request = proto.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        deadline = time.monotonic() + OBJECT_SECONDS
        while time.monotonic() < deadline:
            response = self._call(self._fleet.stub.PullObject, request)
            if not response.object_found:
                break
            if response.object_available:
                return bytes(response.object_content)
            time.sleep(0.1)
        raise FleetError(f"the server has no object {_line(object_id)} of a message that it sent", retry=False)

    def _call(self, method: Callable[..., Any], request: Any, seconds: float = CALL_SECONDS) -> Any:
        timestamp = now().isoformat()
        key = self.load_key()
        metadata = (
            (PUBLIC_KEY_HEADER, public_key_to_bytes(key.public_key())),
            (TIMESTAMP_HEADER, timestamp),
            (SIGNATURE_HEADER, sign_message(key, timestamp.encode("ascii"))),
        )
        try:
            return method(request, metadata=metadata, timeout=seconds)
        except grpc.RpcError as error:
            raise _translate(error) from None


def _translate(error: grpc.RpcError) -> FleetError:
    code, details = error.code(), error.details() or ""
    with suppress(ValueError, KeyError, TypeError):
        details = json.loads(details)["public_message"]  # Flower's own errors are JSON
    retry = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return FleetError(f"{code.name.lower()}: {_line(str(details))}", retry=retry)


def _line(text: str) -> str:
    """A server's text as something that can be logged: printable, on one line, not long."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:MAX_TEXT]
