"""Attack: the server lowers the noise, raises the steps, the clipping norm, the batch or its rate, or asks for a seed.

What holds: the owner's terms are no part of a request. One that names them is refused without a charge, and what is
charged is the owner's noise and rate, whatever came before.
"""

from typing import Any

import pytest

from client.ledger import chain
from tests.hostile.liar import BROKEN, RIGGED, Liar

WEAKER: dict[str, dict[str, Any]] = {
    "lower noise": {"noise_multiplier": 0.1},
    "no noise": {"noise_multiplier": 0.0},
    "larger clip": {"max_grad_norm": 1e9},
    "larger batch": {"batch_size": 359},
    "larger rate": {"sample_rate": 1.0},
    "more steps": {"steps": 5},
    "many more steps": {"steps": 10**9},
    "a seed": {"seed": 1},
    "shuffled batches": {"sampling": "shuffle"},
    "an unknown key": {"debug": "yes"},
}


@pytest.mark.parametrize("changes", WEAKER.values(), ids=WEAKER)
def test_weaker_terms_are_refused_and_cost_nothing(liar: Liar, changes: dict[str, Any]) -> None:
    detail = liar.refuses(RIGGED, liar.honest(**changes), "policy")
    assert "steps" in detail  # out of range, or in the list of what may be asked


def test_what_is_charged_is_the_owners(liar: Liar) -> None:
    name, privacy = liar.run.partitions[RIGGED], liar.run.policy.privacy
    before = liar.run.account(name)
    anchor = {"anchor_sequence": before.sequence, "anchor_head": before.head}
    for changes in ({}, {"noise_multiplier": 0.1}, {"steps": 5}):
        reply = liar.ask(RIGGED, liar.honest(**anchor, **changes))
        assert ("arrays" in reply["records"]) == (not changes), reply
    reserve, _ = chain.read(liar.run.ledger_path(name))[before.sequence :]
    charged = {key: value for key, value in reserve.body.items() if key != "message"}
    assert charged == {
        "noise_multiplier": privacy.noise_multiplier, "sample_rate": privacy.sample_rate, "steps": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["more steps", "lower noise", "larger clip"])
def test_a_client_that_obeys_is_seen(liar: Liar, name: str) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="ledger sequence and records read were"):
        liar.refuses(BROKEN, liar.honest(**WEAKER[name]), "policy")
