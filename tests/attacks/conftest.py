"""What several attacks share: a used ledger, an owner's client, one with holes, and a server that lies."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.owner import Owner, owner
from tests.hostile.liar import Liar, lying
from tests.ledgers import used


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with two committed rounds and one that was never committed: seven lines."""
    return used(tmp_path)


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    with owner(tmp_path_factory.mktemp("honest")) as made:
        yield made


@pytest.fixture(scope="session")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    with owner(tmp_path_factory.mktemp("careless"), "careless") as made:
        yield made


@pytest.fixture(scope="session")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Liar]:
    with lying(tmp_path_factory.mktemp("liar"), broken=True) as made:
        yield made
