"""The ancestor's CNN on made-up pictures, and what a worker spends on a message of it.

A worker keeps its own time: whoever asks from outside counts in ticks of 10 ms.
"""

import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import CLASSES, ancestor_cnn
from benchmarks.worker_host import LOG, RECORDS
from client import app, training
from common.tasks import Data

TEST_RECORDS = 256


class Pictures:
    """A task of the ancestor's size."""

    def model(self) -> nn.Module:
        return ancestor_cnn()

    def prepare(self, inputs: Tensor) -> Tensor:
        return inputs.float().mul_(1 / 127.5).sub_(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")

    def train_data(self, partition: int, partitions: int) -> Data:  # noqa: ARG002
        return _pictures(RECORDS)

    def test_data(self) -> Data:
        return _pictures(TEST_RECORDS)

    def nominal_records(self, partitions: int) -> int:  # noqa: ARG002
        return RECORDS


def timed(root: Path) -> Pictures:
    """The task, whose workers write down the CPU seconds before and after each training, and of each step in it."""
    if app.train is training.train:
        vars(app)["train"] = _Timed(root / LOG)
        step = training.SecureDPOptimizer.step

        def timed_step(self: Any, *arguments: Any) -> Any:
            result = step(self, *arguments)
            _Timed.steps.append(time.process_time())
            return result

        training.SecureDPOptimizer.step = timed_step  # type: ignore[method-assign]
    return Pictures()


class _Timed:
    steps: ClassVar[list[float]] = []  # when each ended, after when the first began

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, *arguments: Any, **more: Any) -> None:
        before = time.process_time()
        self.steps[:] = [before]
        training.train(*arguments, **more)
        after = time.process_time()
        steps = [end - start for start, end in zip(self.steps, self.steps[1:], strict=False)]
        with self._path.open("a", encoding="utf-8") as file:
            print(before, after, *steps, file=file)


def _pictures(records: int) -> Data:
    generator = torch.Generator().manual_seed(records)
    return Data(
        inputs=torch.randint(256, (records, 3, 32, 32), generator=generator, dtype=torch.uint8),
        targets=torch.randint(CLASSES, (records,), generator=generator),
    )
