"""What is unmapped of a process comes back when it is needed, and nothing else is touched."""

import subprocess
import sys
from pathlib import Path

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
