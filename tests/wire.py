"""Messages as they travel, for tests: what SuperLink and whatever starts a Flower app would do is done here."""

from flwr.app import Message, RecordDict
from flwr.proto import message_pb2
from flwr.supercore.task_identity import TaskIdentity

from client.fleet import Inbound, Outbound, pack, unpack


def identify() -> None:
    """Gives this process the identity without which Flower makes no message."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def inbound(content: RecordDict, message_type: str = "train") -> Inbound:
    """A message with this content as a client receives it. Each has an id of its own."""
    identify()
    message = Message(content, dst_node_id=7, message_type=message_type)
    packed = pack(message)
    return Inbound(
        run_id=packed.run_id,
        message_id=message.metadata.message_id,
        envelope=packed.message,
        objects=packed.objects,
    )


def reply(outbound: Outbound) -> Message:
    """The message that a client sends."""
    metadata = message_pb2.Message.FromString(outbound.message).metadata
    sent = Inbound(
        run_id=outbound.run_id, message_id=metadata.message_id, envelope=outbound.message, objects=outbound.objects
    )
    return unpack(sent)
