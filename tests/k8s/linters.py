"""The linters, in a virtual environment of their own beside the control plane: nothing else needs what they need."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tests.federation import ROOT
from tests.k8s.binaries import cache

REQUIREMENTS = ROOT / "requirements/k8s-checks.txt"


def linter(name: str) -> str:
    """The path of one of the pinned linters, installed if need be."""
    folder = cache().parent / f"checks-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    if not (folder / ".installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        install = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "--requirement", str(REQUIREMENTS)]
        subprocess.run([*uv, *install, "--python", str(folder / "bin/python")], check=True)
        (folder / ".installed").touch()
    return str(folder / "bin" / name)


def findings(name: str, *arguments: str | Path) -> str:
    """What the linter says of it: nothing, if all is well."""
    done = subprocess.run([linter(name), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}" or str(done.returncode)
