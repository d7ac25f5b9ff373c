"""`python -m benchmarks [NAME]`: runs one benchmark, or all but the longest; prints tables, writes results/<name>.json.

`python -m benchmarks tables` measures nothing: it makes the plots and README.md's tables from results/ again, as a run
does at its end.
"""

import argparse
import importlib
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from benchmarks import plots, report, tables
from benchmarks.processes import OtherPrograms
from benchmarks.programs import BenchmarkError, Unavailable

NAMES = (
    "step",
    "gpu",
    "message",
    "fleet",
    "endurance",
    "worker",
    "data_path",
    "server_memory",
    "compression",
    "accuracy",
    "time_to_accuracy",
)
LONG = ("endurance",)  # as long as all others together: run by name only
TABLES = "tables"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*NAMES, TABLES)
    words = f"{', '.join(names)}; without one all but {', '.join(LONG)}"
    parser.add_argument("name", nargs="?", choices=names, metavar="NAME", help=words)
    name = parser.parse_args(arguments).name
    signal.signal(signal.SIGTERM, _stop)
    took: dict[str, float] = {}
    failed = False
    for each in [name] if name else [each for each in NAMES if each not in LONG]:
        started = time.monotonic()
        try:
            if each != TABLES:
                _run(each)
        except Unavailable as missing:
            print(f"{each}: {missing}\n", flush=True)
        except BenchmarkError as error:
            print(f"{each}: {error}\n", file=sys.stderr, flush=True)
            failed = True
        took[each] = time.monotonic() - started
    plots.update(NAMES)
    tables.update(NAMES)
    if len(took) > 1:
        each_took = ", ".join(f"{each} {seconds:.0f} s" for each, seconds in took.items())
        print(f"{each_took}: {sum(took.values()):.0f} s in all")
    return int(failed)


def _run(name: str) -> None:
    started, others = time.monotonic(), OtherPrograms()
    result = importlib.import_module(f"benchmarks.{name}").run()
    head = report.header(others.cores())
    path = report.write(name, result, head)
    print(report.text(name, result, head))
    print(f"{time.monotonic() - started:.0f} s, written to {path}\n", flush=True)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # leaves every block, and each ends what it started


if __name__ == "__main__":
    sys.exit(main())
