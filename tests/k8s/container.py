"""What a container runtime does for one container: its own root, mounts, user and process tree, then the command.

Runs as root in namespaces of its own: `python -m tests.k8s.container SPEC.json`. The root is a new tmpfs in which the
image's paths are bound, so that the command sees the manifest's mount paths and nothing else that can be written.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib64",
    *(f"/etc/{name}" for name in ("alternatives", "group", "ld.so.cache", "nsswitch.conf", "passwd", "ssl")),
)  # fmt: skip
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24


def main(path: str) -> None:
    spec: dict[str, Any] = json.loads(Path(path).read_text())
    root = Path(spec["folder"]) / "root"
    root.mkdir()
    mount("-t", "tmpfs", "-o", "mode=755", "root", root)
    for source in _SYSTEM:
        if Path(source).is_symlink():
            (root / source[1:]).symlink_to(os.readlink(source))
        elif Path(source).exists():
            bind(Path(source), root, source, read_only=True)
    make(root, "/proc")
    mount("-t", "proc", "proc", root / "proc")
    make(root, "/dev")
    mount("--rbind", "/dev", root / "dev")
    bind(Path(spec["hosts"]), root, "/etc/hosts", read_only=False)
    for each in sorted(spec["mounts"], key=lambda each: each["path"]):
        bind(Path(each["source"]), root, each["path"], read_only=each["read_only"])
    for source, target in spec["image"].items():
        bind(Path(source), root, target, read_only=True)
    if spec["read_only_root"]:
        mount("-o", "remount,ro", root)
    os.chroot(root)
    os.chdir(spec["directory"])
    drop(spec["user"], spec["group"], spec["groups"])
    os.execvpe(spec["command"][0], spec["command"], spec["environment"])  # noqa: S606


def make(root: Path, target: str) -> Path:
    place = root / target.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    return place


def bind(source: Path, root: Path, target: str, *, read_only: bool) -> None:
    place = root / target.lstrip("/")
    if source.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    elif not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    mount("--bind", source, place)
    if read_only:
        mount("-o", "remount,bind,ro", place)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def drop(user: int, group: int, groups: list[int]) -> None:
    """No capability, now or by any program that is started later."""
    for capability in range(64):
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups(groups)
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")


if __name__ == "__main__":
    main(sys.argv[1])
