"""How every program of ours logs: one line an event, to standard error."""

import logging
import time


def start_logging() -> None:
    """Lines of `2026-01-31T12:00:00Z INFO client.member: text`, in UTC."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ"
    )
    for library in ("absl", "httpx"):  # a line per call
        logging.getLogger(library).setLevel(logging.WARNING)
