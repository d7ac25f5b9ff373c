"""A worker's life: wait for a job, answer it, wait again, end when idle, which returns its GPU memory.

With each job goes a dialogue over the same connection: the worker asks the host, who holds the ledger, for the charge
and the commit; the host answers. `Done` ends it.
"""

import ctypes
import logging
import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict

from client.accounting import Release
from client.app import Bench, client_app
from client.dialogue import Ask, Denied, Done, Job
from client.fleet import CLIENT_APP_CRASHED, Outbound, failure, pack, unpack
from client.ledger import Head
from client.policy import Refused
from common import messages
from common.config import Policy
from common.messages import ARRAYS, REFUSAL, STANDING, STATEMENT, Reason, Standing

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


class RemoteBudget:
    """The `Budget` of `client.app`, answered by the host."""

    def __init__(self, host: Connection, bench: Bench) -> None:
        self._host = host
        self._bench = bench
        self.steps = 0

    def reserve(self, message: str, release: Release, head: Head) -> None:
        self._ask("reserve", message, release, head, self._bench.run)
        self.steps = release.steps

    def commit(self, data: str) -> Standing:
        standing = self._ask("commit", data)
        if not isinstance(standing, Standing):
            raise TypeError("no standing after a commit")
        return standing

    def standing(self) -> Standing | None:
        return self._ask("standing")

    def statement(self, update: str | None) -> str | None:
        """The host's signed words, for a reply whose parameters have the digest `update`."""
        return self._ask("statement", self._bench.run, update)

    def _ask(self, verb: str, *arguments: Any) -> Any:
        self._host.send(Ask(verb=verb, arguments=arguments))
        answer = self._host.recv()
        if isinstance(answer, Denied):
            raise Refused(answer.reason, answer.detail)
        return answer


def serve(policy: Policy, host: Connection) -> None:
    """Answers jobs until none came for `idle_seconds` or the host closed the connection."""
    keep_memory()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // policy.training.max_workers))
    bench = Bench(policy=policy)
    try:
        while host.poll(policy.training.idle_seconds):
            job = host.recv()
            host.send(_answer(job, bench, host))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def keep_memory() -> None:
    """Freed memory stays with this process for its next step, where the C library would give it back each time.

    The per-record part of a step frees and takes tens of megabytes, and half of its time went into new pages.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # GNU's
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def _answer(job: Job, bench: Bench, host: Connection) -> Done:
    started = time.monotonic()
    bench.run = ""  # until this job's proposal names one
    bench.gradient_mode = bench.gradient_mode or job.gradient_mode
    bench.program = job.program
    budget = RemoteBudget(host, bench)
    outbound, refused = _reply(job, bench, budget)
    return Done(
        outbound=outbound,
        round=bench.round,
        seconds=time.monotonic() - started,
        steps=budget.steps,
        refused=refused,
        gradient_mode=bench.gradient_mode,
        gpu_memory_bytes=torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0,
    )


def _reply(job: Job, bench: Bench, budget: RemoteBudget) -> tuple[Outbound, Reason | None]:
    name = job.partition.name
    try:
        message = unpack(job.inbound)
    except Exception as error:
        log.warning("%s: a message cannot be read: %s", name, type(error).__name__)
        return failure(job.inbound, f"the message cannot be read: {type(error).__name__}"), None
    context = Context(
        run_id=job.inbound.run_id,
        node_id=message.metadata.dst_node_id,
        node_config={},
        state=RecordDict(),
        run_config={},
    )
    try:
        reply = client_app(bench, job.partition, budget)(message, context)
        _add_statement(reply, budget)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        # The text of an error may quote a record: only its type leaves, only its type and place are logged.
        place = traceback.extract_tb(error.__traceback__)[-1]
        log.error("%s: %s at %s:%s", name, type(error).__name__, place.filename, place.lineno)
        reply = Message(Error(code=CLIENT_APP_CRASHED, reason=type(error).__name__), reply_to=message)
    return pack(reply), _refused(reply)


def _add_statement(reply: Message, budget: RemoteBudget) -> None:
    """Whatever says where the budget stands goes with the signed statement of it, about the bytes that leave."""
    if not reply.has_content() or STANDING not in reply.content:
        return
    update = messages.digest(reply.content[ARRAYS]) if ARRAYS in reply.content else None  # type: ignore[arg-type]
    if signed := budget.statement(update):
        reply.content[STATEMENT] = messages.statement(signed)


def _refused(reply: Message) -> Reason | None:
    if reply.has_content() and REFUSAL in reply.content:
        return Reason(str(reply.content[REFUSAL]["reason"]))
    return None
