"""One control plane for all of these tests; each takes its own nodes and leaves an empty namespace behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s import binaries
from tests.k8s.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    try:
        made = Cluster(folder)
    except binaries.Missing as missing:
        pytest.skip(f"no control plane, the schemas of test_lint.py have to do: {missing}")
    with made:
        yield made
