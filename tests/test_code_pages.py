"""What is unmapped of a process comes back when it is needed, and nothing else is touched."""

import subprocess
import sys
from pathlib import Path

from common.code_pages import unwritten

ROOT = Path(__file__).parents[1]
PROGRAM = """
import numpy as np, torch
from pathlib import Path
from common.code_pages import unmap_code

def of_files():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss_File:")).split()[1])

held = torch.arange(10**6, dtype=torch.float64), np.arange(10**6)
before = of_files()
unmap_code()
assert of_files() < before / 2, (before, of_files())
assert held[0].sum() == held[1].sum() == 499999500000
layer = torch.nn.Conv2d(3, 4, 3)
layer(torch.randn(2, 3, 8, 8)).sum().backward()
assert layer.weight.grad.isfinite().all()
print("whole")
"""


def test_a_process_works_on_without_the_pages_of_its_libraries() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def mapping(start: int, words: str, anonymous: int = 0, swap: int = 0) -> str:
    return (
        f"{start:x}-{start + 4096:x} {words}\nRss: 4 kB\nAnonymous: {anonymous} kB\nSwap: {swap} kB\nSwapPss: 0 kB\n"
        "VmFlags: rd ex mr mw me\n"
    )


def test_a_mapping_that_was_ever_written_stays() -> None:
    library = "r--p 00000000 fe:00 17 /usr/lib/libc.so.6"
    written = [
        mapping(0x1000, library, anonymous=4),
        mapping(0x2000, library, swap=4),  # relocated, and swapped out since
        mapping(0x3000, library.replace("r--p", "rw-p")),
        mapping(0x4000, "r--p 00000000 00:00 0"),
        mapping(0x5000, "r-xp 00000000 00:00 0 [vdso]"),
    ]
    whole = [mapping(0x6000, library), mapping(0x7000, library.replace("r--p", "r-xp"))]
    assert list(unwritten("".join([*written, *whole]))) == [(0x6000, 0x7000), (0x7000, 0x8000)]
