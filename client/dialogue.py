"""What host and worker say to each other. The host imports this, so it imports no torch."""

from dataclasses import dataclass
from typing import Any

from client.fleet import Inbound, Outbound
from client.program import Program
from common.config import GradientMode, Partition
from common.messages import Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One message for one partition."""

    partition: Partition
    inbound: Inbound
    gradient_mode: GradientMode | None = None  # what a worker found to be the fastest before, if one has tried
    program: Program | None = None  # of gradient_mode compiled


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A question to the host: `reserve`, `commit`, `standing` or `statement`, with that method's arguments."""

    verb: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Denied:
    """The host's no to an `Ask`."""

    reason: Reason
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The reply, and what the exporter shows of the worker."""

    outbound: Outbound
    round: int
    seconds: float
    steps: int  # charged
    refused: Reason | None
    gradient_mode: GradientMode | None
    gpu_memory_bytes: int
