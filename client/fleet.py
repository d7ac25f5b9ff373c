"""The Fleet API over gRPC and TLS: the only file that knows Flower's private modules.

One channel carries all partitions of the process; each call is signed with its partition's own key, as Flower's
SuperNode does. The server's app bundle (FAB) is never asked for. `unpack` and `pack` run in workers, which open no
channel: a message is parsed in a process that may die without harm.
"""

import json
import os
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization.ssh import load_ssh_private_key
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
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

HEARTBEAT_SECONDS = HEARTBEAT_DEFAULT_INTERVAL / 2
CALL_SECONDS = 60.0
OBJECT_SECONDS = 120.0  # for the server to have an object that it announced
MAX_MESSAGE_BYTES = 2**31 - 1
CLIENT_APP_CRASHED = int(ErrorCode.CLIENT_APP_CRASHED)


class FleetError(Exception):
    """A call failed. One line; `retry` says whether the same call may go through later."""

    def __init__(self, text: str, *, retry: bool) -> None:
        super().__init__(text)
        self.retry = retry


@dataclass(frozen=True, kw_only=True, slots=True)
class Inbound:
    """A message from the server as it came: nothing in it has been parsed."""

    run_id: int
    message_id: str
    envelope: bytes  # the message without its content
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
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        return Outbound(
            run_id=reply.metadata.run_id,
            message=message_to_proto(remove_content_from_message(reply)).SerializeToString(),
            tree=get_object_tree(reply).SerializeToString(),
            objects={key: part.deflate() for key, part in get_all_nested_objects(reply).items()},
        )


def failure(inbound: Inbound, reason: str) -> Outbound:
    """An error reply to a message whose content was never parsed."""
    envelope = message_from_proto(proto.Message.FromString(inbound.envelope))
    return pack(Message(Error(code=CLIENT_APP_CRASHED, reason=reason), reply_to=envelope))


class Fleet:
    """The channel to one server."""

    def __init__(self, address: str, ca_certificate: Path) -> None:
        self.address = address
        self._ca = ca_certificate
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 210_000),
        ]
        if is_loopback(address):
            options.append(("grpc.enable_http_proxy", 0))  # gRPC would ask the proxy even for 127.0.0.1
        credentials = grpc.ssl_channel_credentials(ca_certificate.read_bytes())
        self._channel = grpc.secure_channel(address, credentials, options=options)
        self.stub = FleetStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def explain(self) -> str:
        """Why the server cannot be reached: one line for a person, found by trying what gRPC tries."""
        proxy = proxy_in_the_way(self.address)
        if proxy:
            host = split_address(self.address)[0]
            return f"{self.address}: not reached through the proxy {proxy} (to go without it: no_proxy={host})"
        host, port = split_address(self.address)
        try:
            context = ssl.create_default_context(cafile=str(self._ca))
            with (
                socket.create_connection((host, port), timeout=5) as plain,
                context.wrap_socket(plain, server_hostname=host),
            ):
                return f"{self.address}: TLS works, the server does not answer yet"
        except ssl.SSLCertVerificationError as error:
            return f"{self.address}: its certificate is refused by {self._ca}: {error.verify_message}"
        except OSError as error:
            return f"{self.address}: {error.strerror or error}"


class Node:
    """One partition's place in the fleet, proven by its key in every call."""

    def __init__(self, fleet_: Fleet, key_path: Path) -> None:
        self._fleet = fleet_
        key = load_ssh_private_key(key_path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key_path}: expected an EC key")
        self._key = key
        self._public = public_key_to_bytes(key.public_key())
        self._node: NodeProto | None = None

    @property
    def active(self) -> bool:
        return self._node is not None

    def activate(self) -> None:
        """Joins the fleet. Refused while the key is not registered, or another live node holds it."""
        request = fleet.ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        response = self._call(self._fleet.stub.ActivateNode, request)
        self._node = NodeProto(node_id=response.node_id)

    def deactivate(self) -> None:
        node, self._node = self._node, None
        if node is not None:
            self._call(self._fleet.stub.DeactivateNode, fleet.DeactivateNodeRequest(node_id=node.node_id))

    def lost(self) -> None:
        """The server does not know this node any more."""
        self._node = None

    def heartbeat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        if not self._call(self._fleet.stub.SendNodeHeartbeat, request).success:
            raise FleetError("the server does not know this node", retry=True)

    def receive(self) -> Inbound | None:
        """The next message with all its objects, or None."""
        response = self._call(self._fleet.stub.PullMessages, fleet.PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        metadata = response.messages_list[0].metadata
        objects = {
            tree.object_id: self._pull(metadata.run_id, tree.object_id)
            for tree in iterate_object_tree(response.message_object_trees[0])
        }
        confirm = proto.ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        self._call(self._fleet.stub.ConfirmMessageReceived, confirm)
        return Inbound(
            run_id=metadata.run_id,
            message_id=metadata.message_id,
            envelope=response.messages_list[0].SerializeToString(),
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
        raise FleetError(f"the server has no object {object_id} of a message that it sent", retry=False)

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        timestamp = now().isoformat()
        metadata = (
            (PUBLIC_KEY_HEADER, self._public),
            (TIMESTAMP_HEADER, timestamp),
            (SIGNATURE_HEADER, sign_message(self._key, timestamp.encode("ascii"))),
        )
        try:
            return method(request, metadata=metadata, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise _translate(error) from None


def _translate(error: grpc.RpcError) -> FleetError:
    code, details = error.code(), error.details() or ""
    with suppress(ValueError, KeyError, TypeError):
        details = json.loads(details)["public_message"]  # Flower's own errors are JSON
    retry = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return FleetError(f"{code.name.lower()}: {' '.join(details.split())}", retry=retry)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as host and port."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host = split_address(address)[0]
    return host in ("localhost", "::1") or host.startswith("127.")


def proxy_in_the_way(address: str) -> str | None:
    """The proxy that gRPC goes through for `address`: it reads these variables, in lower case only."""
    if is_loopback(address):
        return None
    host = split_address(address)[0]
    exceptions = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112 (as gRPC does)
    if any(host.endswith(suffix.strip()) for suffix in exceptions.split(",") if suffix.strip()):
        return None
    names = ("grpc_proxy", "https_proxy", "http_proxy")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
