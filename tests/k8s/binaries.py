"""The control plane's programs: from KUBEBUILDER_ASSETS, from the PATH, or built once from Kubernetes' own source.

`python -m tests.k8s.binaries` builds what is missing (a quarter of an hour on two cores); with `--have` it only says
whether anything is.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_PROMETHEUS = "github.com/prometheus/prometheus/cmd"
_TAGS = ("-tags", "remove_all_sd,enable_kubernetes_sd")
BUILT = {  # by program: the folder of its go.mod, the package, more flags
    **{
        program: ("controlplane", f"./{program}", ())
        for program in ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
    },
    **{program: ("prometheus", f"{_PROMETHEUS}/{program}", _TAGS) for program in ("prometheus", "promtool")},
}
CONTROL_PLANE = ("etcd", "kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
PROGRAMS = (*CONTROL_PLANE, "prometheus", "promtool")
_STAMP = "k8s.io/component-base/version"


class Missing(Exception):
    """A program cannot be had. One line that says which, and of what."""


def version() -> str:
    """Of Kubernetes, as go.mod has it."""
    text = (HERE / "controlplane/go.mod").read_text()
    found = re.search(r"^\tk8s\.io/kubernetes (v\S+)$", text, re.MULTILINE)
    assert found
    return found[1]


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedeps-k8s" / version()


def find(program: str) -> Path | None:
    """Where the program is, or None. A Prometheus on the PATH may be one without Kubernetes, such as Debian's."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for path in ([Path(assets) / program] if assets else []) + ([cache() / program] if program in BUILT else []):
        if path.is_file():
            return path
    if program in ("prometheus", "promtool"):
        return None
    return Path(found) if (found := shutil.which(program)) else None


def get(program: str) -> Path:
    """The same, built if need be. Raises Missing."""
    if found := find(program):
        return found
    if program not in BUILT:
        hint = {"etcd": "apt-get install etcd-server", "kubectl": "kubernetes.io/docs/tasks/tools"}[program]
        raise Missing(f"{program}: not on PATH nor in KUBEBUILDER_ASSETS ({hint})")
    return build(program)


def build(program: str) -> Path:
    """Raises Missing, with Go's own words about the module that it cannot get."""
    if (go := shutil.which("go")) is None:
        raise Missing(f"{program}: not in {cache()}, and no go on PATH to build it")
    target = cache() / program
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, package, more = BUILT[program]
    major, minor = version().removeprefix("v").split(".")[:2]
    stamps = {"gitVersion": version(), "gitMajor": major, "gitMinor": minor}
    flags = " ".join(["-s -w", *(f"-X {_STAMP}.{name}={value}" for name, value in stamps.items())])
    temporary = target.with_name(f".{program}.{os.getpid()}")
    print(f"building {program} into {target}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            [go, "build", "-trimpath", *more, "-ldflags", flags, "-o", str(temporary), package],
            cwd=HERE / folder, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise Missing(f"{program}: {' '.join(done.stderr.split())[:2000]}")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def main() -> int:
    missing = [program for program in PROGRAMS if find(program) is None]
    if "--have" in sys.argv[1:]:
        print(f"missing: {', '.join(missing)}" if missing else f"all there: {', '.join(PROGRAMS)}")
        return 1 if missing else 0
    try:
        for program in PROGRAMS:
            print(get(program))
    except Missing as error:
        print(f"python -m tests.k8s.binaries: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
