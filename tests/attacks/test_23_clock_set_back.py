"""Attack: the machine's clock is set back, before a start or while the client runs, so that charges look old.

What holds: nothing depends on the time but what is shown: no charge is forgotten, no message is bought twice, and a
ledger whose times go back and forth is a sound one.
"""

from collections.abc import Iterator

import pytest

from client.fleet import pack
from client.ledger import chain
from tests.attacks.site import Site, moved, question, refusal, site
from tests.federation import metrics
from tests.hostile.fleet import Sent

YEARS = 365.25 * 86400
PARTITION = 0
STEPS = 4


@pytest.fixture
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    terms = {"epsilon": 2.0, "noise_multiplier": 1.0, "max_steps_per_round": STEPS}
    with site(tmp_path_factory.mktemp("clock"), clients=1, privacy=terms) as made:
        yield made


def set_clock(owner: Site, years: float) -> None:
    part = owner.folder / "clock.part"
    part.write_text(str(years * YEARS))
    part.replace(owner.folder / "clock")


def exhaust(owner: Site) -> Sent:
    """Trains until the budget is spent; the last message that was charged."""
    last = None
    for _ in range(100):
        sent = Sent.whole(pack(question(steps=STEPS)))
        owner.tell(PARTITION, sent)
        reply = owner.hear(PARTITION)
        assert reply is not None, owner.run.log("client")
        if refusal(reply) is not None:
            assert refusal(reply) == "budget_exhausted"
            assert last is not None, "there was no budget to spend"
            return last
        moved(reply)
        last = sent
    raise AssertionError("the budget is never spent")


def test_a_clock_set_back_gives_nothing_back(owner: Site) -> None:
    client = owner.start(variant="clocked")
    last = exhaust(owner)
    spent, name = owner.account(PARTITION).epsilon_spent, owner.run.partitions[PARTITION]

    for years in (-30, 5, -0.01):  # while it runs
        set_clock(owner, years)
        assert refusal(owner.ask(PARTITION, steps=STEPS)) == "budget_exhausted"
    set_clock(owner, -30)  # and before it starts
    owner.restart(client, variant="clocked")
    client = owner.run.processes[-1]
    assert refusal(owner.ask(PARTITION, steps=STEPS)) == "budget_exhausted"
    owner.tell(PARTITION, last)
    again = owner.hear(PARTITION)
    assert again is not None
    assert refusal(again) == "duplicate"
    assert owner.account(PARTITION).epsilon_spent == spent

    # The owner allows more: charges of three decades are one chain and add up.
    owner.run.policy_content["privacy"]["epsilon"] = 4.0
    owner.run.configure()
    owner.restart(client, variant="clocked")
    client = owner.run.processes[-1]
    moved(owner.ask(PARTITION, steps=STEPS))
    set_clock(owner, 10)
    moved(owner.ask(PARTITION, steps=STEPS))
    set_clock(owner, -10)
    moved(owner.ask(PARTITION, steps=STEPS))
    years = [int(entry.time[:4]) for entry in chain.read(owner.run.ledger_path(name))]
    assert max(years) - min(years) >= 39
    account = owner.account(PARTITION)
    assert account.epsilon_spent > spent
    seen = metrics(owner.run.client_metrics)
    assert seen["fl_privacy_epsilon_spent", name] == account.epsilon_spent
    assert seen["fl_privacy_ledger_ok", name] == 1

    (owner.folder / "clock").unlink()
    owner.restart(client)  # the client as it is, with the true time
    moved(owner.ask(PARTITION, steps=STEPS))
    assert owner.account(PARTITION).epsilon_spent > account.epsilon_spent


def test_a_client_that_trusts_its_clock_is_caught(owner: Site) -> None:
    client = owner.start(variant="forgives_the_future")
    exhaust(owner)
    set_clock(owner, -30)
    owner.restart(client, variant="forgives_the_future")
    moved(owner.ask(PARTITION, steps=STEPS))
    assert owner.account(PARTITION).epsilon_spent > owner.account(PARTITION).budget
