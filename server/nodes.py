"""The connected partitions, and one question to many of them with a deadline.

A node is known by the name that its key was registered under; SuperLink made it prove that it holds the key.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

_LOG = logging.getLogger(__name__)
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS, _SLOWER = 0.05, 1.0, 1.2
_CALL_SECONDS = 0.03  # a call without a reply costs SuperLink and us some 5 ms of CPU together
_AGAIN_SECONDS = 0.5
# SuperLink looks through all questions without a reply whenever any node polls: 2.4 us each, 2.4 ms a poll with 1000 of
# them. So many are asked at first, and more only while no replies come: it is then training that takes long.
_ASKED_FIRST, _ASKED_MORE = 128, 16
_LATE, _UNREADABLE, _UNSENT = 9001, 9002, 9003  # ours, beside Flower's error codes

_NOT_ASKED = "not asked before the round's deadline: others' replies fill server.reply_memory_mb"
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, MemoryError, AttributeError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How many replies may be held at the same time, which is what a round needs of memory."""

    asked: int  # questions without a reply: SuperLink may come to hold so many
    pulled: int  # of which the ServerApp takes so many at once

    @classmethod
    def of(cls, *, memory_bytes: float, reply_bytes: int) -> Self:
        """Replies of `reply_bytes` in `memory_bytes`, but always one."""
        asked = max(1, int(memory_bytes // reply_bytes))
        return cls(asked=asked, pulled=max(1, asked // 16))


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
        self,
        questions: Mapping[str, RecordDict],
        nodes: Mapping[str, int],
        *,
        group: str,
        seconds: float,
        bounds: Bounds,
    ) -> Iterator[tuple[str, Message]]:
        """Each partition with its reply, as they arrive. What has not come after `seconds` is an error reply.

        SuperLink keeps a reply until it is pulled. Therefore no more partitions are asked at once than the replies
        that it may hold; as replies come, further ones are asked.
        """
        limit = min(bounds.asked, _ASKED_FIRST)
        self._drop_late()
        deadline = time.monotonic() + seconds
        unasked, waiting = deque(questions.items()), dict[str, tuple[str, Message]]()
        pause = _FIRST_POLL_SECONDS
        while (unasked or waiting) and time.monotonic() < deadline:
            room = limit - len(waiting)
            # Many at once, as long as replies go on coming: each call hashes the model anew, and may send it anew.
            if unasked and room > 0 and (room * 4 >= limit or pause == _LAST_POLL_SECONDS):
                some = [unasked.popleft() for _ in range(min(room, len(unasked)))]
                left = max(deadline - time.monotonic(), 1e-3)
                for partition, message, id in self._push(some, nodes, group=group, seconds=left):
                    if id:
                        waiting[id] = partition, message
                    else:
                        yield partition, _error(message, _UNSENT, "SuperLink did not take the message")
            calls = -(-len(waiting) // bounds.pulled)  # that one poll takes
            rest = min(max(pause, calls * _CALL_SECONDS), _LAST_POLL_SECONDS)
            time.sleep(max(0.0, min(rest, deadline - time.monotonic())))
            came = False
            for id, reply in self._pull(list(waiting), waiting, bounds.pulled):
                came = True
                yield waiting.pop(id)[0], reply
                del reply  # the next one takes its place
            if not came:
                limit = min(bounds.asked, limit + _ASKED_MORE)
            pause = _FIRST_POLL_SECONDS if came else min(pause * _SLOWER, _LAST_POLL_SECONDS)
        for partition, message in waiting.values():
            yield partition, _error(message, _LATE, f"no reply within {seconds:g} s")
        for partition, content in unasked:
            yield partition, _error(_question(content, nodes[partition], group, seconds), _LATE, _NOT_ASKED)
        self._late = set(waiting)

    def _push(
        self, questions: Iterable[tuple[str, RecordDict]], nodes: Mapping[str, int], *, group: str, seconds: float
    ) -> Iterator[tuple[str, Message, str]]:
        """Send some questions; each with its message and the id that SuperLink knows it by, empty if it does not."""
        # The time to live keeps a client from training for a round that is over.
        messages = {partition: _question(content, nodes[partition], group, seconds) for partition, content in questions}
        ids = self._push_messages(list(messages.values()))
        ids += [""] * (len(messages) - len(ids))
        for (partition, message), id in zip(messages.items(), ids, strict=True):
            yield partition, message, id or ""

    def _push_messages(self, messages: list[Message]) -> list[str]:
        """SuperLink stumbles if the last client that holds the model drops it just while we announce it again.

        Sent again, the same messages are the same ones to it.
        """
        try:
            return list(self._grid.push_messages(messages))
        except Exception as error:  # whatever lies below Flower's grid raises
            _LOG.warning("SuperLink did not take %d messages (%r): sent again", len(messages), error)
        time.sleep(_AGAIN_SECONDS)
        return list(self._grid.push_messages(messages))

    def _pull(
        self, ids: list[str], waiting: Mapping[str, tuple[str, Message]], at_once: int
    ) -> Iterator[tuple[str, Message]]:
        """The replies that have come. One that cannot be decoded is an error reply, and costs few others theirs.

        Flower pulls many at once, forgets them at SuperLink, and only then decodes them: one client that sends
        rubbish would undo the others' replies. It can do so once; then they are pulled one by one.
        """
        size = 1 if self._one_by_one else at_once
        for batch in (set(ids[start : start + size]) for start in range(0, len(ids), size)):
            try:
                replies = deque(self._grid.pull_messages(batch))
            except _MALFORMED as error:
                _LOG.warning("a reply cannot be decoded: %r", error)
                self._one_by_one = True
                if len(batch) == 1:
                    (id,) = batch
                    yield id, _error(waiting[id][1], _UNREADABLE, "the reply cannot be decoded")
                continue
            while replies:  # each is forgotten before the next one is looked at
                reply = replies.popleft()
                if (id := reply.metadata.reply_to_message_id) in batch:
                    yield id, reply
                del reply

    def _drop_late(self) -> None:
        """Fetch the late replies of the round before, only to throw them away: until then SuperLink keeps them."""
        if self._late:
            try:
                list(self._grid.pull_messages(self._late))
            except _MALFORMED as error:
                _LOG.warning("a late reply cannot be decoded: %r", error)


def _question(content: RecordDict, node: int, group: str, seconds: float) -> Message:
    return Message(content, dst_node_id=node, message_type=MessageType.TRAIN, ttl=seconds, group_id=group)


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)
