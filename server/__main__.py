"""`python -m server`: keeps one run going, through crashes of any of its processes, until it has ended."""

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from common.config import ConfigError, Federation, load
from common.files import LockedError, hold
from common.logs import start_logging
from common.process import adopt_orphans
from server import checkpoint, exporter, history, outcome, preflight, relay
from server.superlink import SuperLink

_LOG = logging.getLogger("server")
_CRASHES = 5  # in a row without a completed round in between
_STOPS = (signal.SIGINT, signal.SIGTERM)


class _Stopped(BaseException):
    """A signal asks the server to end. Not an Exception, so that nothing on the way takes it for a failure."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("config/federation.yaml"), help="%(default)s")
    parser.add_argument(
        "--stay",
        action="store_true",
        help="once the run has ended go on serving its metrics, and never run the same configuration twice",
    )
    options = parser.parse_args(arguments)
    path = options.config
    start_logging()
    for number in _STOPS:
        signal.signal(number, _stop)
    try:
        config = load(Federation, path)
        config.server.state.mkdir(parents=True, exist_ok=True)
        with hold(config.server.state / "server.lock"):
            preflight.check(config)
            exporter.serve(config.server)
            if not options.stay:
                return _supervise(config, path)
            code = 0 if checkpoint.finished(config) else _supervise(config, path)
            while code == 0:
                _LOG.info("the run has ended; a changed configuration starts the next one")
                signal.pause()
            return code
    except LockedError:
        return _refuse(f"server.state: {config.server.state} is in use by another python -m server (stop that first)")
    except (ConfigError, outcome.UnusableError, OSError) as error:
        return _refuse(str(error))
    except _Stopped as stopped:
        return 128 + int(stopped.args[0])


def _supervise(config: Federation, path: Path) -> int:
    """The exit code of the run, which is started again after each crash."""
    state = config.server.state
    adopt_orphans()
    crashes, completed = 0, history.completed(state)
    while True:
        try:
            result = _attempt(config, path)
        except outcome.CrashError as crash:
            before, completed = completed, history.completed(state)
            crashes = 1 if completed != before else crashes + 1
            _LOG.warning("%s (crash %d of at most %d without a completed round)", crash, crashes, _CRASHES)
            if crashes < _CRASHES:
                continue
            result = outcome.Outcome(code=1, line=f"gave up after {crashes} crashes without a completed round")
        return _refuse(result.line, result.code) if result.code else 0


def _attempt(config: Federation, path: Path) -> outcome.Outcome:
    """One SuperLink, one ServerApp. Raises CrashError if either ends before the run does."""
    state = config.server.state
    with relay.passing_on(state) as pump, SuperLink(config.server) as superlink:

        def poll() -> None:
            pump()
            superlink.check()

        outcome.forget(state)
        superlink.submit(path)
        return outcome.wait(state, poll=poll)


def _refuse(line: str, code: int = 2) -> int:
    print(f"python -m server: {line}", file=sys.stderr)
    return code


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for each in _STOPS:  # a second one must not interrupt the ending of processes
        signal.signal(each, signal.SIG_IGN)
    raise _Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
