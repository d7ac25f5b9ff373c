"""A worker's life: wait for a job, answer it, wait again, end when idle, which returns its GPU memory.

With each job goes a dialogue over the same connection: the worker asks the host, who holds the ledger, for the charge
and the commit; the host answers. `Done` ends it.
"""

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
from common.config import Policy
from common.messages import REFUSAL, Reason, Standing

log = logging.getLogger(__name__)


class RemoteBudget:
    """The `Budget` of `client.app`, answered by the host."""

    def __init__(self, host: Connection) -> None:
        self._host = host
        self.steps = 0

    def reserve(self, message: str, release: Release, head: Head) -> None:
        self._ask("reserve", message, release, head)
        self.steps = release.steps

    def commit(self, data: str) -> Standing:
        standing = self._ask("commit", data)
        if not isinstance(standing, Standing):
            raise TypeError("no standing after a commit")
        return standing

    def standing(self) -> Standing | None:
        return self._ask("standing")

    def _ask(self, verb: str, *arguments: Any) -> Any:
        self._host.send(Ask(verb=verb, arguments=arguments))
        answer = self._host.recv()
        if isinstance(answer, Denied):
            raise Refused(answer.reason, answer.detail)
        return answer


def serve(policy: Policy, host: Connection) -> None:
    """Answers jobs until none came for `idle_seconds` or the host closed the connection."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // policy.training.max_workers))
    bench = Bench(policy=policy)
    try:
        while host.poll(policy.training.idle_seconds):
            job = host.recv()
            host.send(_answer(job, bench, host))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def _answer(job: Job, bench: Bench, host: Connection) -> Done:
    started = time.monotonic()
    budget = RemoteBudget(host)
    outbound, refused = _reply(job, bench, budget)
    return Done(
        outbound=outbound,
        round=bench.round,
        seconds=time.monotonic() - started,
        steps=budget.steps,
        refused=refused,
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
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        # The text of an error may quote a record: only its type leaves, only its type and place are logged.
        place = traceback.extract_tb(error.__traceback__)[-1]
        log.error("%s: %s at %s:%s", name, type(error).__name__, place.filename, place.lineno)
        reply = Message(Error(code=CLIENT_APP_CRASHED, reason=type(error).__name__), reply_to=message)
    return pack(reply), _refused(reply)


def _refused(reply: Message) -> Reason | None:
    if reply.has_content() and REFUSAL in reply.content:
        return Reason(str(reply.content[REFUSAL]["reason"]))
    return None
