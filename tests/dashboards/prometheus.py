"""A real Prometheus on loopback, with the project's own configuration and rules; only its targets are given."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.federation import ROOT, free_ports, wait_for

CONFIG = ROOT / "monitoring/prometheus/prometheus.yml"
INTERVAL = 1  # seconds between two scrapes, and between two evaluations of the rules


class QueryError(Exception):
    """Prometheus refused a query."""


class Prometheus:
    """Asks the server at `address`."""

    def __init__(self, address: str) -> None:
        self.address = address

    def query(self, expression: str, at: float) -> list[dict[str, Any]]:
        """An instant vector, in the API's own form."""
        return self._get("query", query=expression, time=at)["result"]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """A matrix, in the API's own form."""
        return self._get("query_range", query=expression, start=start, end=end, step=step)["result"]

    def value(self, expression: str) -> float | None:
        """Now, of the only series; None where there is none."""
        result = self.query(expression, time.time())
        assert len(result) <= 1, f"{expression}: {result}"
        return float(result[0]["value"][1]) if result else None

    def ready(self) -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5).status == 200
        return False

    def _get(self, path: str, **arguments: Any) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(f"{arguments['query']}: {error.read().decode()}") from None


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """Scrapes `targets`, addresses by job, and keeps what it finds in `folder`. Needs Debian's package prometheus."""
    program = shutil.which("prometheus")
    assert program, "no prometheus on PATH: apt-get install prometheus"
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = dict.fromkeys(config["global"], f"{INTERVAL}s")
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    config["scrape_configs"] = [
        {"job_name": job["job_name"], "static_configs": [{"targets": list(targets.get(job["job_name"], ()))}]}
        for job in config["scrape_configs"]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with open(folder / "prometheus.log", "ab") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--storage.tsdb.retention.time=10y",  # also of series that were made for a time long ago
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        asked = Prometheus(address)
        wait_for(lambda: process.poll() is not None or asked.ready(), "Prometheus is ready", 120)
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield asked
    finally:
        process.terminate()
        process.wait(timeout=60)
