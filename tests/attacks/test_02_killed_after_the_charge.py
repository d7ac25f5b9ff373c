"""Attack: SIGKILL of the client, its zygote or its worker after the charge and before the reply.

What holds: the charge stays, nothing is released for it, and the same message asked again after a restart is refused.
"""

import os
import signal
from pathlib import Path

import pytest

from client.fleet import pack
from common.messages import ARRAYS
from tests.attacks.owner import Owner, Part
from tests.attacks.site import question, refusal
from tests.federation import wait_for
from tests.hostile.fleet import Sent


def killed(owner: Owner, kind: str) -> Sent:
    """Kills it while a worker reads the records of a new message, and looks for the charge. The message."""
    owner.site.end_workers(owner.client)  # which may have the records already
    before, read = owner.site.account(Part.KILLED), owner.records_read()
    sent = Sent.whole(pack(question()))
    with owner.held():
        owner.site.tell(Part.KILLED, sent)
        wait_for(lambda: owner.records_read() > read, "a worker that reads the records", 120)
        worker = Path(f"/proc/{owner.process('worker')}")
        os.kill(owner.process(kind), signal.SIGKILL)
        if kind == "host":
            owner.client.wait(60)
        wait_for(lambda: not worker.exists(), "the end of the worker, which dies with the others", 60)
    after = owner.site.account(Part.KILLED)
    assert len(after.messages) == len(before.messages) + 1, "records were read and nothing was charged"
    assert after.epsilon_spent > before.epsilon_spent
    assert after.commits == before.commits
    return sent


@pytest.mark.parametrize("kind", ["worker", "zygote", "host"])
def test_the_charge_stays_and_nothing_is_released(honest: Owner, kind: str) -> None:
    sent = killed(honest, kind)
    charged = honest.site.account(Part.KILLED)
    if kind != "host":  # a worker dies with its zygote
        reply = honest.site.hear(Part.KILLED)
        assert reply is not None
        assert reply.error.reason == "the worker died"
    if kind == "zygote":
        honest.client.wait(60)  # it ends by itself, once that reply has left
    if kind != "worker":
        honest.start()
    honest.site.tell(Part.KILLED, sent)
    again = honest.site.hear(Part.KILLED)
    assert again is not None
    assert refusal(again) == "duplicate"
    account = honest.site.account(Part.KILLED)
    assert (account.epsilon_spent, account.commits) == (charged.epsilon_spent, charged.commits)
    assert account.epsilon_reserved > 0
    assert ARRAYS in honest.ask(Part.KILLED).content  # and the next one trains


def test_a_client_that_pays_after_training_is_seen(careless: Owner) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="nothing was charged"):
        killed(careless, "worker")
    assert careless.site.hear(Part.KILLED) is not None
