"""Who asks the server when: a few threads serve all partitions of a process, so that hundreds cost no thread each.

Each partition is asked for on its own time: soon while a round is on, seldom when nothing happens, never all at once,
and for all of them together at a bounded rate, whatever their number. The first message of a round, to whichever
partition, makes the others ask soon. A message is answered on a thread of its own, of which there are as many as can
train and a few that send; while all are at work nobody asks, so that what waits for a worker waits at the server.
"""

import heapq
import logging
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from client.fleet import Inbound
from client.member import Member, jitter
from client.workers import ZygoteDied

log = logging.getLogger(__name__)

POLLERS = 6  # threads that ask; the server answers one at a time
SENDERS = 4  # jobs beyond those that train
STAGGER_SECONDS = 0.02  # between the joins of two partitions
BUSY_POLLS, IDLE_POLLS = 100.0, 25.0  # per second, of all partitions together, in a round and between rounds
FAST_SECONDS = 0.2  # between two polls of a partition, at least
GROWTH = 1.5  # of that time, once the round is quiet
QUIET_TURNS = 2.0  # in which no partition had a message: a server may send a round's bit by bit


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Seconds between two polls of one partition: in a round that it has no message of, and at most."""

    fast: float
    idle: float

    @classmethod
    def of(cls, partitions: int) -> Self:
        return cls(
            fast=max(FAST_SECONDS, partitions / BUSY_POLLS),
            idle=max(min(3.0, 0.3 + 0.02 * partitions), partitions / IDLE_POLLS),
        )


class Rota:
    """Serves `members` from `start` until `stop` is set and `end` was called."""

    def __init__(self, members: Sequence[Member], max_workers: int, stop: threading.Event) -> None:
        self._members = members
        self._stop = stop
        self._free = max_workers + SENDERS  # jobs that could be begun
        self._pace = Pace.of(len(members))
        self._change = threading.Condition()
        now = time.monotonic()
        self._due = [(now + number * STAGGER_SECONDS, number) for number in range(len(members))]  # who is not at work
        self._interval = [self._pace.fast] * len(members)
        self._failing: set[int] = set()  # a round does not call those who back off
        self._round: tuple[int, str] | None = None
        self._heard = float("-inf")  # when the last message came
        self._at_work = 0
        self._pollers = [
            threading.Thread(target=self._poll, name=f"poller-{number}", daemon=True)
            for number in range(min(POLLERS, len(members)))
        ]
        self.failed: str | None = None  # why nothing can be served any more

    def start(self) -> None:
        for poller in self._pollers:
            poller.start()

    def end(self, seconds: float) -> None:
        """After `stop`: all leave the fleet, those at work when they are done. Returns when they have, or in time."""
        deadline = time.monotonic() + seconds
        with self._change:
            self._change.notify_all()
        for poller in self._pollers:
            poller.join(max(0.0, deadline - time.monotonic()))
        with self._change:
            self._change.wait_for(lambda: not self._at_work, max(0.0, deadline - time.monotonic()))

    def fail(self, why: str) -> None:
        """Nothing can be trained any more: sets `stop`. When all is to end anyway it is no failure."""
        if not self._stop.is_set():
            self.failed = f"no worker can be forked any more: {why} (start this process again)"
            self._stop.set()

    def _poll(self) -> None:
        while (number := self._next()) is not None:
            try:
                inbound, wait = self._members[number].poll()
            except Exception as error:
                inbound, wait = None, self._own_error(number, error)
            if inbound is None:
                self._back(number, wait)
            else:
                self._begin(number, inbound)
        self._leave()

    def _leave(self) -> None:
        """Takes those who are not at work out of the fleet. Several threads share in it."""
        while (number := self._leaver()) is not None:
            try:
                self._members[number].leave()
            except Exception as error:
                self._own_error(number, error)

    def _next(self) -> int | None:
        """The member whose time has come, with room for its job; None once all is to end."""
        with self._change:
            while not self._stop.is_set():
                if not self._due or not self._free:
                    self._change.wait()
                elif (early := self._due[0][0] - time.monotonic()) > 0:
                    self._change.wait(early)
                else:
                    self._free -= 1
                    return heapq.heappop(self._due)[1]
            return None

    def _leaver(self) -> int | None:
        with self._change:
            return heapq.heappop(self._due)[1] if self._due else None

    def _back(self, number: int, wait: float | None) -> None:
        """Its next time: after `wait`, or at its own pace."""
        with self._change:
            self._free += 1
            self._failing.discard(number)
            if wait is None:
                wait = self._interval[number] * jitter()
                if time.monotonic() - self._heard > QUIET_TURNS * self._pace.fast:
                    self._interval[number] = min(self._pace.idle, GROWTH * self._interval[number])
            else:
                self._failing.add(number)
            heapq.heappush(self._due, (time.monotonic() + wait, number))
            self._change.notify()

    def _begin(self, number: int, inbound: Inbound) -> None:
        with self._change:
            self._at_work += 1
            self._heard = time.monotonic()
            self._failing.discard(number)
            if self._round != (inbound.run_id, inbound.group):
                self._round = inbound.run_id, inbound.group
                self._call_all()
        name = self._members[number].partition.name
        threading.Thread(target=self._work, args=(number, inbound), name=name, daemon=True).start()

    def _call_all(self) -> None:
        """A round has begun: the others' messages are there, or will be in a moment."""
        now = time.monotonic()
        for place, (due, number) in enumerate(self._due):
            if number not in self._failing:
                self._interval[number] = self._pace.fast
                self._due[place] = min(due, now + random.uniform(0, self._pace.fast)), number  # noqa: S311 (not secret)
        heapq.heapify(self._due)
        self._change.notify_all()

    def _work(self, number: int, inbound: Inbound) -> None:
        wait = None
        try:
            self._members[number].serve(inbound, self._stop)
        except Exception as error:
            wait = self._own_error(number, error)
        self._interval[number] = self._pace.idle  # the next round calls it
        self._back(number, wait)
        if self._stop.is_set():
            self._leave()
        with self._change:
            self._at_work -= 1
            self._change.notify_all()

    def _own_error(self, number: int, error: Exception) -> float:
        """Logs what should not have happened; returns the seconds after which the member goes on."""
        if isinstance(error, ZygoteDied):
            self.fail(str(error))
        else:
            name = self._members[number].partition.name
            log.error("%s: goes on after an error of ours", name, exc_info=error)
        return 1.0
