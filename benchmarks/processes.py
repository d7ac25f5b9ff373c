"""What a tree of processes costs, from /proc: CPU seconds and memory. Linux only, as the product is."""

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
_STATE, _PPID, _UTIME, _CUTIME = 0, 1, slice(11, 13), slice(13, 15)  # in the fields of /proc/PID/stat after the name


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU used so far by `roots` and all their descendants, ended ones included where a parent waited for them."""
    stats = _stats()
    ticks = 0
    for pid in _tree(roots, stats):
        ticks += sum(map(int, (*stats[pid][_UTIME], *stats[pid][_CUTIME])))
    return ticks * _TICK


def own_cpu_seconds(pid: int) -> float:
    """CPU used so far by one process, without its children."""
    return sum(map(int, _stats()[pid][_UTIME])) * _TICK


def memory_mb(roots: Iterable[int]) -> float:
    """Proportional set size of `roots` and all their descendants, in 1e6 bytes: a page that n processes share
    counts 1/n in each, so that a sum over processes is what they hold together."""
    return sum(map(_pss, _tree(roots, _stats()))) / 1e6


def alive(roots: Iterable[int]) -> int:
    """How many processes `roots` and their descendants are, without those that have ended and were not waited for."""
    stats = _stats()
    return sum(stats[pid][_STATE] != "Z" for pid in _tree(roots, stats))


class MemoryPeak(threading.Thread):
    """A context that looks at `memory_mb` again and again; `mb` is the most it saw."""

    def __init__(self, roots: Iterable[int], *, every: float) -> None:
        super().__init__(daemon=True)
        self.mb = 0.0
        self._every = every  # seconds: a look at a process that has loaded torch takes some 10 ms of CPU
        self._roots = list(roots)
        self._stop_looking = threading.Event()

    def run(self) -> None:
        while not self._stop_looking.wait(self._every):
            self.mb = max(self.mb, memory_mb(self._roots))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_looking.set()
        self.join()


def descendant(root: int, program: str) -> int:
    """The process under `root` whose command line names `program`. Raises LookupError if there is none."""
    for pid in sorted(_tree([root], _stats())):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(Path(word).name == program for word in words[:2]):
            return pid
    raise LookupError(f"no {program} under process {root}")


class OtherPrograms:
    """How much of the machine others have used since this was made."""

    def __init__(self) -> None:
        self._started, self._before = time.monotonic(), _others_seconds()

    def cores(self) -> float:
        """Cores, on average. Processes that nobody waits for, such as our own workers, pass for others' too."""
        return (_others_seconds() - self._before) / (time.monotonic() - self._started)


def _others_seconds() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) * _TICK - sum(os.times()[:4])


def _stats() -> dict[int, list[str]]:
    stats = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats[int(entry.parent.name)] = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return stats


def _tree(roots: Iterable[int], stats: dict[int, list[str]]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[_PPID]), []).append(pid)
    found: set[int] = set()
    waiting = [pid for pid in roots if pid in stats]
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += children.get(pid, [])
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
