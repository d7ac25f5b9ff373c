"""Attack: the ledger is deleted though its partition was used, so that a new one would start with all of the budget.

What holds: it is never made anew by itself; made anew by hand it is refused by the anchor file, and, without that, by
what an honest server remembers. Who deletes ledger and anchor and lies as the server gets a new budget.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from client.ledger import LedgerError, create
from common.messages import ARRAYS
from tests.attacks.owner import Owner, Part, others_train, refuses
from tests.federation import ROOT
from tests.ledgers import opened, terms


def test_what_is_missing_is_never_made_anew(tmp_path: Path, path: Path) -> None:
    anchor = tmp_path / "elsewhere/a.json"
    with opened(path, anchor):
        pass
    path.unlink()
    with pytest.raises(LedgerError, match="missing"), opened(path, anchor):
        pass
    with pytest.raises(LedgerError, match="used before"):
        create(path, partition="a", privacy=terms(), anchor=anchor)
    assert not path.exists()
    anchor.write_text("{}")
    with pytest.raises(LedgerError, match="not a ledger's anchor"):
        create(path, partition="a", privacy=terms(), anchor=anchor)
    create(tmp_path / "b.jsonl", partition="a", privacy=terms())
    with pytest.raises(LedgerError, match="exists already"):
        create(tmp_path / "b.jsonl", partition="a", privacy=terms())


def test_a_client_without_its_ledger_trains_nothing(honest: Owner) -> None:
    refuses(honest, Part.MISSING, "ledger")
    others_train(honest)
    assert f"{honest.site.run.partitions[Part.MISSING]}/ledger.jsonl: missing. If partition" in honest.log()


def test_a_ledger_made_anew_is_behind_what_the_server_has_seen(honest: Owner) -> None:
    name, seen = honest.site.run.partitions[Part.MISSING], honest.seen[Part.MISSING]
    command = [sys.executable, "-m", "client.ledger", "create", str(honest.path(Part.MISSING))]
    command += ["--policy", str(honest.site.folder / "policy.yaml"), "--partition", name]
    anchor = honest.anchor(Part.MISSING)
    anchor.write_text(f'{{"sequence": {seen.sequence}, "hash": "{seen.hash}"}}')
    refused = subprocess.run(command, cwd=honest.site.folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert b"was used before" in refused.stderr
    anchor.unlink()
    subprocess.run(command, cwd=honest.site.folder, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    refuses(honest, Part.MISSING, "rollback", anchor_sequence=seen.sequence, anchor_head=seen.hash)


def test_a_client_that_makes_what_is_missing_is_seen(careless: Owner) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="it trained"):
        refuses(careless, Part.MISSING, "ledger")
    assert ARRAYS in careless.ask(Part.MISSING).content
    assert careless.site.account(Part.MISSING).epsilon_spent < careless.before[Part.MISSING]  # a new budget
