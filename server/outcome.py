"""How the ServerApp tells the supervisor, several processes above it, how the run ended.

While the ServerApp lives it holds a lock. A lock that is free again and no outcome written: it crashed.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import ConfigError
from common.files import hold, is_held, replace
from common.tasks import TaskError

_LOG = logging.getLogger(__name__)
_PATIENCE_SECONDS = 30.0  # for the lock of a ServerApp that was killed and is about to go
_START_SECONDS = 120.0  # from submitting a run to a ServerApp that runs: a new Python process that imports Flower
_POLL_SECONDS = 0.1


class RunError(RuntimeError):
    """The run cannot go on, and starting it again would not help. One line."""


class UnusableError(ValueError):
    """What the server is given, a file or a setting, cannot be used. One line that names it and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended."""

    code: int  # of the server's exit
    line: str  # for a person


class CrashError(RuntimeError):
    """The ServerApp ended without an outcome, or never came."""


@contextmanager
def report(state: Path) -> Iterator[None]:
    """Hold the lock while the ServerApp works in it, and write how that ended unless it crashed."""
    with hold(_lock(state), patience=_PATIENCE_SECONDS):
        try:
            yield
        except RunError as error:
            _write(state, Outcome(code=1, line=str(error)))
        except (ConfigError, TaskError, UnusableError) as error:
            _write(state, Outcome(code=2, line=str(error)))
        except Exception:
            _LOG.exception("the ServerApp crashed")  # Flower's own words about it are lost
            raise
        else:
            _write(state, Outcome(code=0, line=""))


def forget(state: Path) -> None:
    """Remove the outcome of an earlier ServerApp, once that is gone. Raises LockedError if it stays."""
    with hold(_lock(state), patience=_PATIENCE_SECONDS):
        _file(state).unlink(missing_ok=True)


def wait(state: Path, *, poll: Callable[[], None]) -> Outcome:
    """The outcome of the ServerApp that is being started; `poll` is called often, and may raise.

    Raises CrashError if the ServerApp ends without one.
    """
    deadline = time.monotonic() + _START_SECONDS
    seen = False
    while True:
        poll()
        held = is_held(_lock(state))
        if _file(state).exists():  # looked for after the lock: it is written before the lock is dropped
            return Outcome(**json.loads(_file(state).read_text(encoding="utf-8")))
        seen = seen or held
        if seen and not held:
            raise CrashError("the ServerApp ended without an outcome")
        if not seen and time.monotonic() > deadline:
            raise CrashError(f"no ServerApp within {_START_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


def _lock(state: Path) -> Path:
    return state / "serverapp.lock"


def _file(state: Path) -> Path:
    return state / "outcome.json"


def _write(state: Path, outcome: Outcome) -> None:
    replace(_file(state), json.dumps(asdict(outcome)).encode())
