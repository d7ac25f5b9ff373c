"""`make dashboards`: a real federation, watched by a real Prometheus, as docs/privacy-budget.png and docs/fleet.png.

`--partitions N --to FOLDER` draws N made-up partitions instead: how does it look when there are many?
"""

import argparse
import tempfile
from pathlib import Path

from tests.dashboards.many_partitions import many_partitions
from tests.dashboards.panels import Window, dashboards
from tests.dashboards.picture import build, draw
from tests.dashboards.prometheus import Prometheus
from tests.dashboards.recorded_run import recorded_run
from tests.federation import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.dashboards", description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "docs", help="where the pictures go")
    parser.add_argument("--partitions", type=int, help="this many made-up ones, not a run")
    parser.add_argument("--no-build", action="store_true", help="main.jsx is built already")
    options = parser.parse_args()
    if not options.no_build:
        build()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def pictures(source: Prometheus, window: Window) -> None:
            for path in dashboards():
                picture = options.to.absolute() / f"{path.stem}.png"
                draw(path, window, source, picture, folder)
                print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")

        if options.partitions:
            with many_partitions(folder, count=options.partitions, seconds=150) as (source, window):
                pictures(source, window)
        else:
            with recorded_run(folder) as recorded:
                pictures(recorded.source, recorded.window)


if __name__ == "__main__":
    main()
