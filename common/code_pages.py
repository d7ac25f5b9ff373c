"""Shared libraries in memory: read while a program is loaded, and for the most part never again. Linux only."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def unmap_code() -> None:
    """Gives to the system what was read of shared libraries: what is needed is mapped again when it is needed.

    A process that has imported torch and waits would hold some 250 MB of them. Only mappings of which nothing was
    written: there a page is what the file says. No other thread may load, unload or map a file meanwhile: something
    else could lie there then.
    """
    madvise = ctypes.CDLL(None).madvise
    mappings: list[tuple[int, int]] = []
    with suppress(OSError):  # where /proc is not to be read, they stay
        mappings = list(unwritten(Path("/proc/self/smaps").read_text()))
    for start, end in mappings:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def unwritten(smaps: str) -> Iterator[tuple[int, int]]:
    """Start and end of the read-only mappings of files without a page of their own, be it swapped out: proc(5)."""
    mapping: tuple[int, int] | None = None
    for line in smaps.splitlines():
        words = line.split()
        if "-" in words[0]:
            start, _, end = words[0].partition("-")
            of_a_file = len(words) > 5 and words[5].startswith("/") and words[1] in ("r--p", "r-xp")
            mapping = (int(start, 16), int(end, 16)) if of_a_file else None
        elif words[0] in ("Anonymous:", "Swap:") and words[1] != "0":
            mapping = None
        elif words[0] == "VmFlags:" and mapping:  # the last line of each
            yield mapping
