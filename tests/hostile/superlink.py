"""`python -m tests.hostile.superlink`: the real SuperLink with the lying bundle, until it is ended."""

import time
from pathlib import Path

from common.config import Federation, load
from common.process import adopt_orphans
from server import superlink

LIFE_SECONDS = 1800.0


class Talkative(superlink.SuperLink):
    """Logs every call of the Fleet API."""

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "FLWR_LOG_LEVEL": "INFO"}


def main() -> None:
    path = Path("federation.yaml")
    superlink._BUNDLE = Path(__file__).parent / "bundle"
    adopt_orphans()
    with Talkative(load(Federation, path).server) as running:
        running.submit(path)
        deadline = time.monotonic() + LIFE_SECONDS
        while time.monotonic() < deadline:
            running.check()
            time.sleep(0.5)


if __name__ == "__main__":
    main()
