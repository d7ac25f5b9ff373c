"""`python -m benchmarks [NAME]`: runs one benchmark or all, prints a table each, and writes results/<name>.json."""

import argparse
import importlib
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from benchmarks import report
from benchmarks.processes import OtherPrograms
from benchmarks.programs import BenchmarkError, Unavailable

NAMES = ("step", "data_path", "gpu", "message", "fleet", "accuracy")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)}; all without one")
    name = parser.parse_args(arguments).name
    signal.signal(signal.SIGTERM, _stop)
    for each in [name] if name else NAMES:
        try:
            _run(each)
        except Unavailable as missing:
            print(f"{each}: {missing}\n")
        except BenchmarkError as error:
            print(f"{each}: {error}", file=sys.stderr)
            return 1
    return 0


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
