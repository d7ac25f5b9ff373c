"""What several attacks share."""

from pathlib import Path

import pytest

from tests.ledgers import used


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with two committed rounds and one that was never committed: seven lines."""
    return used(tmp_path)
