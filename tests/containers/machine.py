"""A Docker daemon of the tests' own: Debian's packages, a data root that keeps layers between runs, ended by its id.

Nothing of it touches another daemon of the machine: its socket, its state and its images are its own. Needs root.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import hold
from common.process import tethered

CACHE = Path.home() / ".cache/fedeps-containers"
PACKAGES = ("docker.io", "docker-compose", "debootstrap", "iptables")
BASE = "fedeps-test/debian:bookworm"  # stands in for NVIDIA's image, which comes from a registry
_RUN = Path("/run/fedeps-containers")
_START_SECONDS = 120.0
# What the images of Debian and Ubuntu in registries have, so that apt-get leaves nothing behind.
_CLEAN = """Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb || true"; };
"""


def install() -> None:
    """Debian's packages, unless they are here."""
    needed = [name for name in PACKAGES if not _installed(name)]
    if needed:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(["apt-get", "install", "-q", "-y", "--no-install-recommends", *needed], check=True, env=quiet)


@contextmanager
def daemon() -> Iterator[dict[str, str]]:
    """A running daemon; the environment that makes `docker` and `docker-compose` speak to it, and to no other."""
    if os.geteuid() != 0:
        raise SystemExit("tests/containers: a Docker daemon needs root (run as root, or in a virtual machine)")
    install()
    CACHE.mkdir(parents=True, exist_ok=True)
    _RUN.mkdir(parents=True, exist_ok=True)
    with hold(CACHE / "lock", patience=1800.0), (CACHE / "dockerd.log").open("wb") as log:
        process = subprocess.Popen(
            tethered([
                "dockerd",
                *("--host", f"unix://{_RUN}/docker.sock", "--pidfile", f"{_RUN}/docker.pid"),
                *("--data-root", str(CACHE / "docker"), "--exec-root", str(_RUN / "exec")),
            ]),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        try:
            environment = _environment()
            _wait(process, environment)
            yield environment
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ensure_base(environment: dict[str, str]) -> None:
    """The base image, made by debootstrap the first time."""
    if subprocess.run(["docker", "image", "inspect", BASE], env=environment, capture_output=True).returncode == 0:
        return
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        root = Path(folder) / "root"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True)
        (root / "etc/apt/apt.conf.d/docker-clean").write_text(_CLEAN)
        for kept in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / kept)
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(["docker", "import", "-", BASE], stdin=tar.stdout, env=environment, check=True)


def forget_old_layers(environment: dict[str, str]) -> None:
    """Leave of the cache what today's images are made of: each change of the requirements adds 6 GB to it."""
    subprocess.run(["docker", "container", "prune", "--force"], env=environment, check=True, capture_output=True)
    subprocess.run(["docker", "image", "prune", "--force"], env=environment, check=True, capture_output=True)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_"))}
    return {
        **kept,
        "PATH": f"/usr/bin:/usr/sbin:/bin:/sbin:{os.environ.get('PATH', '')}",  # Debian's client goes with its daemon
        "DOCKER_HOST": f"unix://{_RUN}/docker.sock",
        "DOCKER_BUILDKIT": "0",  # Debian has no BuildKit
        "COMPOSE_DOCKER_CLI_BUILD": "0",
        "DOCKER_CONFIG": str(CACHE / "client"),  # nobody's credentials
    }


def _wait(process: subprocess.Popen[bytes], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while subprocess.run(["docker", "version"], env=environment, capture_output=True).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"dockerd does not answer; its words are in {CACHE / 'dockerd.log'}")
        time.sleep(0.2)


def _installed(package: str) -> bool:
    shown = subprocess.run(["dpkg-query", "-W", "-f", "${Status}", package], capture_output=True, text=True)
    return shown.stdout == "install ok installed"
