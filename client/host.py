"""The light process of a client: the rota of its partitions, their heartbeats, the exporter. Imports no torch."""

import importlib
import logging
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from client.exporter import application
from client.fleet import Fleet, heartbeat_seconds
from client.member import Member
from client.reach import proxy_in_the_way
from client.rota import Rota
from client.workers import CannotCompile, Workers
from client.zygote import wait_for_end
from common.certificates import PkiError
from common.code_pages import unmap_code
from common.config import Policy
from common.http import serve

log = logging.getLogger(__name__)

LEAVE_SECONDS = 20.0  # for a round in flight, when asked to stop; what is not done by then stays spent
KEPT_BYTES = 2**28  # of what the server sent, for other partitions of this process


class HostError(Exception):
    """This process cannot serve. One line."""


def run(policy: Policy, zygote: socket.socket, stop: threading.Event) -> None:
    """Serves all partitions of `policy` until `stop` is set.

    Raises:
        HostError: a file or port cannot be had, or no worker can be forked any more.
    """
    importlib.import_module("dp_accounting")  # not in the first answer to a scrape or a round
    unmap_code()
    workers = Workers(zygote, policy.training.max_workers)
    address = policy.client.server_address
    authority, metrics = policy.client.ca_certificate, policy.client.metrics_address
    try:
        # What one partition was sent is kept for the others, if there are any.
        fleet = Fleet(address, authority, kept_bytes=KEPT_BYTES if len(policy.partitions) > 1 else 0)
    except OSError as error:
        raise HostError(
            f"client.ca_certificate: {authority}: {error.strerror} (the server's operator has it)"
        ) from error
    except PkiError as error:
        raise HostError(f"client.ca_certificate: {error}") from error
    members = [Member(partition, policy, fleet, workers) for partition in policy.partitions]
    if all(problems := [member.key_problem() for member in members]):
        raise HostError(f"no partition has a key that can be used: {problems[0]}")
    try:
        serve(application(policy, members, workers), metrics)
    except (OSError, OverflowError) as error:
        text = getattr(error, "strerror", None) or error
        raise HostError(f"client.metrics_address: {text} (stop what uses it, or choose another)") from error
    if proxy := proxy_in_the_way(address):
        log.warning("the server %s is reached through the proxy %s (no_proxy names hosts without one)", address, proxy)

    with ExitStack() as stack:
        if policy.training.gradient_mode == "compiled":
            try:
                folder = stack.enter_context(TemporaryDirectory(prefix="fedeps-", ignore_cleanup_errors=True))
                workers.compile(Path(folder), stop)
            except (CannotCompile, OSError) as error:
                raise HostError(f"training.gradient_mode: compiled: {error} (use auto)") from None
        rota = Rota(members, policy.training.max_workers, stop)
        rota.start()
        threading.Thread(target=_fail_without, args=(zygote, rota), name="zygote", daemon=True).start()
        _beat(members, fleet, stop)
        rota.end(LEAVE_SECONDS)
        fleet.close()
    if rota.failed:
        raise HostError(rota.failed)


def _fail_without(zygote: socket.socket, rota: Rota) -> None:
    """Not first with the next message: who could not train is not to stay in the fleet and look ready."""
    wait_for_end(zygote)
    rota.fail("the process that forks them has ended")


def _beat(members: Sequence[Member], fleet: Fleet, stop: threading.Event) -> None:
    """Heartbeats until `stop` is set, each member's in its turn, spread over the interval."""
    step = heartbeat_seconds(len(members)) / len(members)
    due = time.monotonic()
    for member in cycle(members):
        due = max(due + step, time.monotonic())
        if stop.wait(due - time.monotonic()):
            return
        member.heartbeat()
        fleet.objects.forget_unused()
