"""The light process of a client: a thread per partition, one for heartbeats, the exporter. Imports no torch."""

import logging
import socket
import threading
import time

from client.exporter import application
from client.fleet import HEARTBEAT_SECONDS, Fleet, proxy_in_the_way
from client.member import Member
from client.workers import Workers, ZygoteDied
from common.certificates import PkiError
from common.config import Policy
from common.http import serve

log = logging.getLogger(__name__)

LEAVE_SECONDS = 20.0  # for a round in flight, when asked to stop; what is not done by then stays spent
STAGGER_SECONDS = 0.02  # between the joins of two partitions


class HostError(Exception):
    """This process cannot serve. One line."""


def run(policy: Policy, zygote: socket.socket, stop: threading.Event) -> None:
    """Serves all partitions of `policy` until `stop` is set.

    Raises:
        HostError: a file or port cannot be had, or no worker can be forked any more.
    """
    workers = Workers(zygote, policy.training.max_workers)
    address = policy.client.server_address
    authority, metrics = policy.client.ca_certificate, policy.client.metrics_address
    try:
        fleet = Fleet(address, authority)
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

    failed: list[str] = []

    def live(member: Member) -> None:
        while not stop.is_set():
            try:
                member.run(stop)
            except ZygoteDied as error:
                failed.append(f"no worker can be forked any more: {error} (start this process again)")
                stop.set()
            except Exception:
                log.exception("%s: goes on after an error of ours", member.partition.name)
                stop.wait(1.0)

    threads = [
        threading.Thread(target=live, args=(member,), name=member.partition.name, daemon=True) for member in members
    ]
    for thread in threads:
        thread.start()
        stop.wait(STAGGER_SECONDS)
    while not stop.wait(HEARTBEAT_SECONDS):
        for member in members:
            if not stop.is_set():
                member.heartbeat()
    deadline = time.monotonic() + LEAVE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    fleet.close()
    if failed:
        raise HostError(failed[0])
