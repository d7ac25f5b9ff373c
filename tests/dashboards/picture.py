"""A dashboard as a picture: Grafana's own panel components draw its JSON with what a real Prometheus answers.

Grafana itself would also do the querying and the variables; panels.py does that here. All else is Grafana's code.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.dashboards import panels
from tests.dashboards.panels import Window
from tests.dashboards.prometheus import Prometheus
from tests.federation import ROOT

SOURCE = ROOT / "tests/dashboards/grafana"
SCRIPT = SOURCE / "build/main.js"
WIDTH, HEADER, ROW = 1600, 72, 38  # pixels; main.jsx lays out by the same numbers
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

_PAGE = """<!doctype html><meta charset="utf-8"><body style="margin: 0"><div id="root"></div>
<script>const {data};</script>
<script src="{script}"></script>
"""


def build() -> None:
    """Installs Grafana's components, pinned by package-lock.json, and makes `SCRIPT` of them and main.jsx."""
    npm = _program("npm")
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=SOURCE, check=True)
    subprocess.run([npm, "run", "build"], cwd=SOURCE, check=True)


def draw(dashboard: Path, window: Window, source: Prometheus, picture: Path, folder: Path) -> None:
    """Writes the PNG `picture` of the dashboard over `window`; `folder` takes the page and the browser's profile."""
    content = panels.load(dashboard)
    answers = {
        f"{panel['id']}{target['refId']}": panels.answer(target, window, source)
        for panel in panels.panels(content)
        for target in panel.get("targets", ())
    }
    values = {
        "DASHBOARD": content, "ANSWERS": answers, "STEP": window.step,
        "SHOWN": [1000 * window.start, 1000 * window.end],
    }  # fmt: skip
    data = ", ".join(f"{name} = {_script(value)}" for name, value in values.items())
    page = folder / f"{dashboard.stem}.html"
    page.write_text(_PAGE.format(data=data, script=SCRIPT.as_uri()))
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in content["panels"])
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.unlink(missing_ok=True)
    done = subprocess.run(
        [
            _program(*BROWSERS), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=20000",
            f"--user-data-dir={folder / 'browser'}", f"--window-size={WIDTH},{HEADER + rows * ROW}",
            f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Error" in line]
    assert errors == []
    assert picture.exists(), done.stderr


def _script(value: Any) -> str:
    return json.dumps(value).replace("</", "<\\/")


def _program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"none of {', '.join(names)} is on PATH"
    return found
