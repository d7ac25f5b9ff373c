"""The connected partitions, and one question to many of them with a deadline.

A node is known by the name that its key was registered under; SuperLink made it prove that it holds the key.
"""

import logging
import time
from collections.abc import Iterator, Mapping

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

_LOG = logging.getLogger(__name__)
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS, _SLOWER = 0.05, 1.0, 1.2
_LATE, _UNREADABLE, _UNSENT = 9001, 9002, 9003  # ours, beside Flower's error codes


class Nodes:
    """Flower's grid, by partition."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._one_by_one = False
        self._late: set[str] = set()

    def connected(self) -> dict[str, int]:
        """The node id of each partition that is connected now. A node without a registered name is none."""
        return {node.name: node.node_id for node in self._grid.get_nodes() if node.name}

    def ask(
        self, questions: Mapping[str, RecordDict], nodes: Mapping[str, int], *, group: str, seconds: float
    ) -> Iterator[tuple[str, Message]]:
        """Each partition with its reply, as they arrive. What has not come after `seconds` is an error reply."""
        deadline = time.monotonic() + seconds
        messages = {
            # The time to live keeps a client from training for a round that is over.
            partition: Message(
                content,
                dst_node_id=nodes[partition],
                message_type=MessageType.TRAIN,
                ttl=seconds,
                group_id=group,
            )
            for partition, content in questions.items()
        }
        ids = list(self._grid.push_messages(list(messages.values())))
        ids += [""] * (len(messages) - len(ids))
        waiting = {}
        for (partition, message), id in zip(messages.items(), ids, strict=True):
            if id:
                waiting[id] = partition
            else:
                yield partition, _error(message, _UNSENT, "SuperLink did not take the message")
        pause = _FIRST_POLL_SECONDS
        while waiting and time.monotonic() < deadline:
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            came = False
            for id, reply in self._pull(set(waiting), messages, waiting):
                came = True
                yield waiting.pop(id), reply
            pause = _FIRST_POLL_SECONDS if came else min(pause * _SLOWER, _LAST_POLL_SECONDS)
        for partition in waiting.values():
            yield partition, _error(messages[partition], _LATE, f"no reply within {seconds:g} s")
        self._drop_late()
        self._late = set(waiting)

    def _pull(
        self, ids: set[str], messages: Mapping[str, Message], waiting: Mapping[str, str]
    ) -> Iterator[tuple[str, Message]]:
        """The replies that have come. One that cannot be decoded is an error reply, and costs nobody else theirs.

        Flower pulls many at once, forgets them at SuperLink, and only then decodes them: one client that sends
        rubbish would undo the others' replies. It can do so once; then they are pulled one by one.
        """
        for batch in [{id} for id in ids] if self._one_by_one else [ids]:
            try:
                replies = list(self._grid.pull_messages(batch))
            except (ValueError, TypeError, KeyError, IndexError, MemoryError, AttributeError) as error:
                _LOG.warning("a reply cannot be decoded: %r", error)
                self._one_by_one = True
                if len(batch) == 1:
                    (id,) = batch
                    yield id, _error(messages[waiting[id]], _UNREADABLE, "the reply cannot be decoded")
                continue
            for reply in replies:
                if (id := reply.metadata.reply_to_message_id) in batch:
                    yield id, reply

    def _drop_late(self) -> None:
        """Fetch the late replies of the round before, only to throw them away: until then SuperLink keeps them."""
        if self._late:
            try:
                list(self._grid.pull_messages(self._late))
            except (ValueError, TypeError, KeyError, IndexError, MemoryError, AttributeError) as error:
                _LOG.warning("a late reply cannot be decoded: %r", error)


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)
