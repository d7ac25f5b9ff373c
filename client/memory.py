"""How many records a pass takes on the CPU: by what this process may still use, and what a few public records used.

A pass that is too large does not fail there as it does on a GPU: the kernel ends the process that is beyond its
container's limit, and the charge with it is lost. So the size is found before a charge.
"""

import ctypes
import logging
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from client.gpu import Pass
from client.policy import Refused
from common.messages import Reason

log = logging.getLogger(__name__)

_TRIED = 16  # records in a rehearsal
_USED = 0.8  # of what is free: the rest is for what else this process and others do meanwhile
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of a memory control group, versions 2 and 1: limit, use, and what of the use are files that the kernel would give up.
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device. On the CPU only the text of torch's error tells."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def give_back() -> None:
    """To the system, what the C library keeps of freed memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # GNU's
        libc.malloc_trim(0)


def rehearse(passes: Pass, inputs: Tensor, targets: Tensor, *, most: int, records: int, workers: int) -> int:
    """The largest of `most`, `most` / 2, ... records of which a pass should fit, where `workers` share what is free.

    `inputs` [n, ...] and `targets` [n, ...] are public records, repeated as needed; `records` like them take their room
    beside the pass. A few are tried, and more are taken to cost in proportion, which is rather too much: what a pass
    costs at any size is counted with each. Where the system does not tell what a pass used, it is `most`.

    Raises:
        Refused: there is no room for one record. Nothing has been charged.
    """
    used: dict[int, int | None] = {}
    resident = records * sum(part[:1].nbytes for part in (inputs, targets))
    size = most
    while size:
        tried = min(size, _TRIED)
        if tried not in used:
            chosen = torch.arange(tried) % len(inputs)
            try:
                used[tried] = _used(passes, inputs[chosen], targets[chosen])
            except OSError as error:
                log.info("passes of %d records: what one uses is not told here (%s)", most, error)
                return most
        room = _USED * free_bytes() / workers - resident
        needed = used[tried]
        if needed is not None and needed * size / tried <= room:
            return size
        size //= 2
        log.warning("a pass does not fit in this worker's share of the memory: tries %d records", size)
    raise Refused(Reason.MEMORY, "there is no memory for one record (fewer max_workers, or wait)")


def free_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """What this process can still take: of the machine, of its control groups, of its own address space."""
    return max(0, min(_free(proc, cgroups), default=2**62))


def _free(proc: Path, cgroups: Path) -> Iterator[int]:
    if (available := _field(proc / "meminfo", "MemAvailable:")) is not None:
        yield 1024 * available
    for folder in _groups(proc, cgroups):
        for limit, use, files in _LIMITS:
            most, taken = _number(folder / limit), _number(folder / use)
            if most is not None and taken is not None:
                yield most - taken + (_field(folder / "memory.stat", files) or 0)
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        yield most - 1024 * (_field(proc / "self/status", "VmSize:") or 0)


def _groups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """The control groups that bound this process's memory, and those around them; a container sees its own as root."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = cgroups if number == "0" else cgroups / "memory"
        folder = top / path.strip("/")
        yield from (folder, *(each for each in folder.parents if each.is_relative_to(top)))


def _number(path: Path) -> int | None:
    """None without the file, or where it says `max`: no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return None
    return next((int(row[1]) for row in rows if len(row) > 1 and row[0] == name), None)


def _used(passes: Pass, inputs: Tensor, targets: Tensor) -> int | None:
    """Bytes by which this process grew in a pass, at its largest; None where the memory did not suffice."""
    give_back()  # else the pass would use again what an earlier one left, and seem to cost nothing
    (_PROC / "self/clear_refs").write_text("5")  # the largest size so far is the present one: proc(5)
    before = _field(_PROC / "self/status", "VmRSS:")
    try:
        passes(inputs, targets)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return None
    largest = _field(_PROC / "self/status", "VmHWM:")
    if before is None or largest is None:
        raise OSError("no sizes in /proc/self/status")
    return 1024 * max(0, largest - before)
