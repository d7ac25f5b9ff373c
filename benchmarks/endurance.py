"""The fleet for longer: 20 rounds of 200 clients in one process, 5 rounds of 1000 clients in two. By its name only.

What is measured is what benchmarks.fleet measures.
"""

from benchmarks.fleet import Size, measure
from benchmarks.report import Result

SIZES = (Size(clients=200, rounds=20), Size(clients=1000, rounds=5, processes=2))


def run() -> Result:
    return measure(SIZES)
