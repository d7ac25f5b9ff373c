"""Who is there: the connected partitions, those with budget left among them, and for how long others are waited for."""

import logging
import random
import time
from typing import Any

from common.config import Federation
from server.checkpoint import Checkpoint
from server.history import write_status
from server.nodes import Nodes
from server.outcome import RunError

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.2


class Attendance:
    """Each registered partition is waited for `connect_deadline_seconds` after it was last seen, or after the start."""

    def __init__(self, config: Federation, nodes: Nodes, checkpoint: Checkpoint, *, registered: frozenset[str]) -> None:
        self._config, self._nodes, self._checkpoint = config, nodes, checkpoint
        self._last_seen = dict.fromkeys(registered, time.monotonic())
        self._status: dict[str, Any] = {}

    def connected(self) -> dict[str, int]:
        """The node of each connected partition. Also noted in the status file, for whoever wants to know."""
        connected = {name: node for name, node in self._nodes.connected().items() if name in self._last_seen}
        self._last_seen |= dict.fromkeys(connected, time.monotonic())
        status = {
            "run": self._checkpoint.run,
            "round": min(self._checkpoint.round + 1, self._config.rounds),
            "rounds": self._config.rounds,
            "connected": sorted(connected),
            "exhausted": self.exhausted(),
        }
        if status != self._status:
            write_status(self._config.server.state, status)
            self._status = status
        return connected

    def wait_for_the_first(self) -> None:
        """Return once `min_clients` are connected. Raises RunError at the deadline."""
        seconds, wanted = self._config.connect_deadline_seconds, self._config.min_clients
        deadline = time.monotonic() + seconds
        _LOG.info("run %s: waiting for %d partitions", self._checkpoint.run, wanted)
        while len(connected := self.connected()) < wanted:
            if time.monotonic() > deadline:
                names = ", ".join(sorted(connected)) or "none"
                raise RunError(
                    f"min_clients: {wanted} partitions did not connect within connect_deadline_seconds={seconds:g};"
                    f" connected: {names} (start more clients, or lower min_clients)"
                )
            time.sleep(_POLL_SECONDS)

    def candidates(self) -> dict[str, int]:
        """Who is connected and has budget: `fit_clients` or more, unless waiting for others has been in vain."""
        while True:
            connected = self.connected()
            spent = set(self.exhausted())
            candidates = {name: node for name, node in connected.items() if name not in spent}
            if len(candidates) >= self._config.fit_clients or not self._expected(connected.keys() | spent):
                return candidates
            time.sleep(_POLL_SECONDS)

    def sample(self, round: int, attempt: int, candidates: dict[str, int]) -> list[str]:
        """`fit_clients` of them, the same ones whenever the same are there."""
        generator = random.Random(f"{self._config.seed}:{round}:{attempt}")  # noqa: S311 (not secret)
        return generator.sample(sorted(candidates), min(self._config.fit_clients, len(candidates)))

    def exhausted(self) -> list[str]:
        """Partitions known to have no budget left."""
        return sorted(name for name, member in self._checkpoint.members.items() if member.exhausted)

    def _expected(self, others: set[str]) -> bool:
        """Whether any partition but these may still come."""
        past = time.monotonic() - self._config.connect_deadline_seconds
        return any(seen > past for name, seen in self._last_seen.items() if name not in others)
