"""Attack: a new run, a new model or a new task on the same data, as if the budget began with them.

What holds: they are all charged to the partition's one ledger; a task that is not the owner's own is refused.
"""

import pytest
import yaml

from client.fleet import pack
from common.messages import ARRAYS
from tests.attacks.owner import Owner, Part
from tests.attacks.site import question, refusal, weights
from tests.hostile.fleet import Sent


def runs(owner: Owner) -> None:
    """Three runs, each with a model of its own, of two steps each."""
    before = owner.site.account(Part.RUNS)
    charged = len(before.messages)
    spent = before.epsilon_spent
    for number in range(3):
        message = question({name: value + 0.1 * number for name, value in weights().items()})
        message.metadata.__dict__["_run_id"] = 1000 + number
        sent = Sent.whole(pack(message))
        assert sent.message.metadata.run_id == 1000 + number
        owner.site.tell(Part.RUNS, sent)
        reply = owner.site.hear(Part.RUNS)
        assert reply is not None
        assert ARRAYS in reply.content
        account = owner.site.account(Part.RUNS)
        assert account.epsilon_spent > spent, "another run began with another budget"
        assert account.ledger == before.ledger
        spent = account.epsilon_spent
        charged += 1
        assert len(account.messages) == charged


def test_runs_and_models_share_one_ledger(honest: Owner) -> None:
    runs(honest)


def test_a_task_of_the_servers_is_refused(honest: Owner) -> None:
    before = honest.site.account(Part.RUNS).sequence
    for task in ("digits", "tests.attacks.task:Other", "os:system"):
        assert refusal(honest.ask(Part.RUNS, task=task)) == "policy"
    assert honest.site.account(Part.RUNS).sequence == before


def test_another_task_of_the_owners_goes_on_with_the_same_ledger(honest: Owner) -> None:
    before = honest.site.account(Part.RUNS)
    policy = honest.site.folder / "policy.yaml"
    kept = policy.read_text()
    policy.write_text(yaml.safe_dump({**yaml.safe_load(kept), "task": "digits"}))
    honest.restart()
    try:
        assert ARRAYS in honest.ask(Part.RUNS, task="digits").content
    finally:
        policy.write_text(kept)
        honest.restart()
    account = honest.site.account(Part.RUNS)
    assert account.ledger == before.ledger
    assert account.epsilon_spent > before.epsilon_spent
    assert account.messages > before.messages


def test_a_client_with_a_ledger_for_each_run_is_seen(careless: Owner) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="another budget"):
        runs(careless)
