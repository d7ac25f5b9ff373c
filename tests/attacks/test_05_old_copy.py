"""Attack: an old copy of the ledger, whole and honest once, is put back: what was spent since would be free.

What holds: the owner's anchor file refuses it at the start, an honest server's memory with the first question. Who puts
back both and lies as the server is not seen: docs/privacy.md says so.
"""

from pathlib import Path

import pytest

from client.ledger import Head, LedgerError, RolledBack
from tests.attacks.owner import Owner, Part, others_train, refuses
from tests.ledgers import opened, release


def test_an_old_copy_is_found_by_the_anchor_file_and_by_the_server(tmp_path: Path, path: Path) -> None:
    anchor = tmp_path / "elsewhere/a.json"
    with opened(path, anchor) as ledger:
        old = path.read_bytes()
        ledger.commit(ledger.reserve("m4", release()))
        seen = Head(sequence=ledger.account.sequence, hash=ledger.account.head)
        ledger.require_head(seen)
        ledger.require_head(Head(sequence=0, hash=""))
    path.write_bytes(old)  # whole lines are missing at the end
    with pytest.raises(RolledBack, match="an old copy was put back"), opened(path, anchor):
        pass
    with opened(path) as ledger:  # without the anchor file the server's memory tells
        with pytest.raises(RolledBack):
            ledger.require_head(seen)
        ledger.reserve("other", release(steps=1))
        ledger.reserve("another", release(steps=1))
        with pytest.raises(RolledBack, match="not the one seen before"):
            ledger.require_head(seen)
        with pytest.raises(RolledBack):
            ledger.require_head(Head(sequence=-1, hash=""))


def test_every_cut_between_lines_is_found_by_the_anchor(tmp_path: Path, path: Path) -> None:
    anchor = tmp_path / "elsewhere/a.json"
    with opened(path, anchor):
        pass
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(LedgerError) as caught, opened(path, anchor):
            pass
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, RolledBack) == (kept > 0)  # an empty file is none of ours
    path.write_bytes(b"".join(lines))
    with opened(path, anchor):
        pass


def test_a_client_with_an_old_copy_trains_nothing(honest: Owner) -> None:
    seen = honest.seen[Part.OLD_WITHOUT_ANCHOR]
    refuses(honest, Part.OLD, "ledger")
    refuses(honest, Part.OLD_WITHOUT_ANCHOR, "rollback", anchor_sequence=seen.sequence, anchor_head=seen.hash)
    assert honest.log().count("an old copy was put back") >= 2
    others_train(honest)


@pytest.mark.parametrize("part", [Part.OLD, Part.OLD_WITHOUT_ANCHOR])
def test_a_client_that_looks_at_no_anchor_is_seen(careless: Owner, part: Part) -> None:
    """Negative control."""
    seen = careless.seen[part]
    with pytest.raises(AssertionError, match="it trained"):
        refuses(careless, part, "ledger", anchor_sequence=seen.sequence, anchor_head=seen.hash)
