"""Smaller updates: how many bytes, how many objects at SuperLink, and what it costs in accuracy.

The default run of digits by the real federation, with and without; beside it what lossless methods of Python's own
library make of a noised update of a larger model. Noise has no pattern, so that they are not offered.
"""

import lzma
import multiprocessing
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import get_args

import numpy as np
from flwr.app import ArrayRecord

from benchmarks import federation
from benchmarks.report import Result, Row
from common.compression import pack
from common.config import Compression, Privacy, Training

REPEATS = 5
ROUNDS, CLIENTS = 3, 2  # of config/federation.yaml and config/policy.yaml
_PRIVACY = Privacy(
    epsilon=8.0, delta=1e-5, noise_multiplier=1.5, max_grad_norm=0.5, batch_size=64, records=718,
    max_steps_per_round=12, accounting="adaptive",
)  # fmt: skip
_LEARNING_RATE = 16.0
_PARAMETERS = 10**6  # of the update that is packed for its size and time
_TIMES = 5


def run() -> Result:
    # Two at a time, as in benchmarks/accuracy.py.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        running = {each: [pool.submit(_train, each) for _ in range(REPEATS)] for each in get_args(Compression)}
        try:
            accuracies = {each: [run.result() for run in runs] for each, runs in running.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    sizes = _sizes()
    rows = [
        Row(
            case="digits, default run" if variant in accuracies else "lossless",
            variant=variant,
            median_s=round(seconds, 4),
            baseline="none",
            ratio=round(size / sizes["none"][0], 4),
            runs=len(accuracies.get(variant, ())) or _TIMES,
            more={"bytes_per_parameter": round(size / _PARAMETERS, 3)}
            | (_accuracy(accuracies[variant]) if variant in accuracies else {}),
        )
        for variant, (size, seconds) in sizes.items()
    ]
    plain, packed = (median(accuracies[each]) for each in ("none", "int8"))
    return Result(
        measures=f"ratio: bytes of an update over those without compression, for {_PARAMETERS:,} noised parameters;"
        " median_s: seconds to pack it; accuracy on 360 test digits, median, least and most of the runs",
        rows=rows,
        findings=[
            f"int8 sends {rows[1].ratio:.3f} of the bytes; accuracy {packed:.3f}, without compression {plain:.3f}",
            *(f"{name} would send {sizes[name][0] / sizes['none'][0]:.3f} of them" for name in ("zlib", "lzma")),
        ],
    )


def _accuracy(found: list[float]) -> dict[str, float]:
    return {
        "accuracy": round(median(found), 4),
        "min_accuracy": round(min(found), 4),
        "max_accuracy": round(max(found), 4),
    }


def _train(compression: Compression) -> float:
    with federation.train(
        federation.split("digits", CLIENTS),
        _PRIVACY,
        Training(device="cpu"),
        rounds=ROUNDS,
        learning_rate=_LEARNING_RATE,
        compression=compression,
    ) as run:
        for _ in run.completed():
            pass
        accuracy: float = run.results()[1]["test_accuracy"]
        return accuracy


def _sizes() -> dict[str, tuple[int, float]]:
    """Bytes of a noised update, and the median of the seconds that packing it takes, by method."""
    generator = np.random.default_rng(0)
    before = generator.normal(0, 0.05, _PARAMETERS).astype(np.float32)
    after = before + generator.normal(0, 0.01, _PARAMETERS).astype(np.float32)

    def ours(compression: Compression) -> Callable[[], int]:
        return lambda: _bytes(pack({"weight": after}, lambda _: before, compression))

    methods: dict[str, Callable[[], int]] = {
        "none": ours("none"),
        "int8": ours("int8"),
        "zlib": lambda: len(zlib.compress(after.tobytes(), 6)),
        "lzma": lambda: len(lzma.compress(after.tobytes(), preset=1)),
    }
    found = {}
    for name, method in methods.items():
        seconds = []
        for _ in range(_TIMES):
            started = time.perf_counter()
            size = method()
            seconds.append(time.perf_counter() - started)
        found[name] = size, median(seconds)
    return found


def _bytes(record: ArrayRecord) -> int:
    return sum(array.numpy().nbytes for array in record.values())
