"""`python -m local run NAME=VALUE...`, `plan NAME=VALUE...` and `forget`: what the verbs of the Makefile call."""

import argparse
import errno
import sys

from common.config import ConfigError
from common.files import LockedError, hold
from common.pki import PkiError
from local import parameters, plan, plan_view
from local.errors import LocalError
from local.forgetting import forget
from local.preparation import STATE, prepare
from local.progress import Progress
from local.runner import Stopped, catch_signals, run

_LOCK = STATE / "run.lock"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="train: a server and its clients as processes on this machine")
    verb.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help=", ".join(parameters.NAMES))
    verb = verbs.add_parser("plan", help="what a budget buys: noise for rounds, rounds for noise, in both modes")
    verb.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help=", ".join(parameters.names(plan.Wishes)))
    verb = verbs.add_parser("forget", help="remove the demo's state, budgets included")
    verb.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    try:
        catch_signals()
        if options.verb == "plan":
            _plan(parameters.read_as(plan.Wishes, options.parameters))
            return 0
        given = parameters.read(options.parameters) if options.verb == "run" else None
        STATE.mkdir(exist_ok=True)
        with hold(_LOCK):
            if given is None:
                forget(STATE, _LOCK, agreed=options.yes)
            else:
                _run(given)
    except LockedError:
        return _refuse(f"another run is active in this directory: it holds {_LOCK} (wait for it, or end it)")
    except LocalError as error:
        return _refuse(str(error), error.code)
    except (ConfigError, PkiError) as error:
        return _refuse(str(error))
    except OSError as error:
        full = error.errno == errno.ENOSPC
        return _refuse(f"no space left on the disk of {error.filename or STATE} (free some)" if full else str(error), 1)
    except Stopped:
        print("\nStopped: all that was started has ended. The same command goes on after the last round;")
        print("any other starts a new run, on the same ledgers.")
        return 130
    return 0


def _run(given: parameters.Parameters) -> None:
    federation, policy = prepare(given)
    progress = Progress(sys.stdout, federation, policy)
    try:
        run(progress)
    finally:
        progress.clear()
    progress.finish()


def _plan(wishes: plan.Wishes) -> None:
    made = plan.plan(plan.terms(wishes))
    path = made.terms.plot
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plan_view.chart(made).document(), encoding="utf-8")
    print(plan_view.text(made))
    print(f"The plot: {path}")


def _refuse(line: str, code: int = 2) -> int:
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
