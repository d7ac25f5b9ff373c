"""Attack: the server asks a client to reset, raise or refund its budget, by keys, by records and by other messages.

What holds: no message does it. Only the owner's policy changes a budget, at a start, and that is a line in the ledger.
"""

from pathlib import Path
from typing import Any

import pytest

from client.conversation import Conversation
from client.dialogue import Ask
from client.ledger import chain, read
from common.messages import Standing
from tests.hostile.liar import BROKEN, RIGGED, Liar
from tests.ledgers import opened, terms

KEYS: dict[str, dict[str, Any]] = {
    "larger budget": {"epsilon": 1e9},
    "another budget": {"epsilon_budget": 1e9},
    "other delta": {"delta": 0.1},
    "reset": {"reset": True},
    "refund": {"refund": 2},
    "spent": {"epsilon_spent": 0.0},
    "other accounting": {"accounting": "fixed"},
    "other ledger": {"ledger": "new"},
    "other partition": {"partition": "fresh"},
}
RECORDS: dict[str, dict[str, Any]] = {
    name: {name: {"kind": "config", "values": {"epsilon": 1e9}}} for name in ("budget", "ledger", "privacy", "reset")
} | {
    "standing": {"standing": {"kind": "config", "values": {"epsilon_spent": 0.0, "epsilon_budget": 1e9}}},
    "refusal": {"refusal": {"kind": "config", "values": {"reason": "policy", "detail": ""}}},
}
KINDS = ("query", "query.reset", "evaluate", "evaluate.budget", "train.reset")


@pytest.mark.parametrize("changes", KEYS.values(), ids=KEYS)
def test_a_key_does_not(liar: Liar, changes: dict[str, Any]) -> None:
    assert "expected a record of" in liar.refuses(RIGGED, liar.honest(**changes), "policy")


@pytest.mark.parametrize("records", RECORDS.values(), ids=RECORDS)
def test_a_record_does_not(liar: Liar, records: dict[str, Any]) -> None:
    assert "expected no records but" in liar.refuses(RIGGED, liar.honest() | records, "policy")


@pytest.mark.parametrize("kind", KINDS)
def test_another_message_does_not(liar: Liar, kind: str) -> None:
    with liar.untouched(RIGGED):
        reply = liar.ask(RIGGED, liar.honest(), kind)
    assert reply == {"error": "ValueError"}


def test_after_all_of_it_the_budget_is_the_owners(liar: Liar) -> None:
    """And a round that trains says so: the first one and the same one again count from the same budget."""
    account = liar.run.account(liar.run.partitions[RIGGED])
    anchor = {"anchor_sequence": account.sequence, "anchor_head": account.head, "round": 0}
    standing = liar.ask(RIGGED, liar.honest(**anchor))["records"]["standing"]
    assert standing["epsilon_budget"] == account.budget == liar.run.policy.privacy.epsilon
    assert standing["epsilon_spent"] > account.epsilon_spent
    kinds = [entry.kind for entry in chain.read(liar.run.ledger_path(account.partition))]
    assert kinds.count("create") == kinds.count("open") == 1
    assert "budget" not in kinds


@pytest.mark.parametrize("verb", ["reset", "refund", "budget", "create", "open", "close", "ledger", "_reserve"])
def test_a_worker_that_obeys_a_server_has_no_word_for_it(path: Path, verb: str) -> None:
    """It reads the server's message; of the ledger it can ask to reserve, to commit, and where it stands."""
    before = path.read_bytes()
    with opened(path) as ledger:
        with pytest.raises(KeyError):
            Conversation(ledger, terms()).answer(Ask(verb=verb, arguments=(1e9,)))
        assert isinstance(Conversation(ledger, terms()).answer(Ask(verb="standing")), Standing)
    assert path.read_bytes()[: len(before)] == before
    assert read(path).budget == terms().epsilon


@pytest.mark.parametrize("name", ["larger budget", "reset"])
def test_a_client_that_passes_over_such_a_key_is_seen(liar: Liar, name: str) -> None:
    """Negative control: of what it does not know it says nothing, and trains."""
    with pytest.raises(AssertionError, match="ledger sequence and records read were"):
        liar.refuses(BROKEN, liar.honest(**KEYS[name]), "policy")
