"""Attack: one byte of the ledger is edited, a line dropped, two swapped, the tail torn off: in any place.

What holds: the file is refused, nothing is trained or written, and the other partitions go on.
"""

from pathlib import Path

import pytest

from client.ledger import chain
from tests.attacks.holes import lenient
from tests.attacks.owner import Owner, Part, others_train, refuses

SPOILED = {Part.BYTE: "edited", Part.DROPPED: "does not follow", Part.SWAPPED: "does not follow", Part.TORN: "torn"}


def test_every_changed_byte_is_found(path: Path) -> None:
    raw = path.read_bytes()
    for position in range(len(raw)):
        for flip in (0x01, 0x20):
            edited = bytearray(raw)
            edited[position] ^= flip
            with pytest.raises(chain.ChainError) as caught:
                chain.decode(bytes(edited), path)
            assert "\n" not in str(caught.value)


def test_every_dropped_swapped_or_torn_line_is_found(path: Path) -> None:
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    for index in range(len(lines) - 1):  # the last one's absence only an anchor can tell
        with pytest.raises(chain.ChainError):
            chain.decode(b"".join(lines[:index] + lines[index + 1 :]), path)
    for left in range(len(lines)):
        for right in range(left):
            swapped = list(lines)
            swapped[left], swapped[right] = swapped[right], swapped[left]
            with pytest.raises(chain.ChainError):
                chain.decode(b"".join(swapped), path)
    for length in range(len(raw)):
        if raw[:length].endswith(b"\n"):
            continue  # whole lines are missing: see the anchors
        with pytest.raises(chain.ChainError):
            chain.decode(raw[:length], path)


def test_a_reader_that_checks_no_hash_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of both."""
    monkeypatch.setattr(chain, "decode", lenient)
    for attack in (test_every_changed_byte_is_found, test_every_dropped_swapped_or_torn_line_is_found):
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            attack(path)


@pytest.mark.parametrize(("part", "why"), SPOILED.items(), ids=[part.name for part in SPOILED])
def test_a_client_with_a_tampered_ledger_trains_nothing(honest: Owner, part: Part, why: str) -> None:
    refuses(honest, part, "ledger")
    others_train(honest)
    (line, *_) = [line for line in honest.log().splitlines() if f"/{honest.site.run.partitions[part]}/" in line]
    assert why in line


@pytest.mark.parametrize("part", SPOILED, ids=[part.name for part in SPOILED])
def test_a_client_that_reads_what_is_there_is_seen(careless: Owner, part: Part) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="it trained"):
        refuses(careless, part, "ledger")
