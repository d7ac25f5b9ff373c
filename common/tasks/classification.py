"""What the shipped tasks share: labelled images split over partitions, and cross-entropy."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.tasks.partition import iid
from common.tasks.protocol import Data

Split = Callable[[Tensor, int, int], list[int]]  # labels, partition, partitions -> indices


class Classification(ABC):
    """A `Task` over a public data set, of which each partition plays an owner's private data."""

    records: ClassVar[int]  # size of the training set: published, so not a secret of any partition

    def __init__(self, root: Path, *, split: Split = iid) -> None:
        self.root = root
        self.split = split

    @abstractmethod
    def model(self) -> nn.Module: ...

    def prepare(self, inputs: Tensor) -> Tensor:
        """uint8 pixels to floats in [-1, 1]: constants, since a mean over a batch would mix its records."""
        pixels = inputs.float()
        return torch.add(pixels.new_full((), -1.0), pixels, alpha=1 / 127.5, out=pixels)  # in one pass

    @abstractmethod
    def load(self, *, train: bool) -> Data:
        """Return the whole training or test set."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")

    def train_data(self, partition: int, partitions: int) -> Data:
        data = self.load(train=True)
        chosen = self.split(data.targets, partition, partitions)
        return Data(inputs=data.inputs[chosen], targets=data.targets[chosen])

    def test_data(self) -> Data:
        return self.load(train=False)

    def nominal_records(self, partitions: int) -> int:
        if not 1 <= partitions <= self.records:
            raise ValueError(f"expected partitions={partitions} in [1, {self.records}]")
        return self.records // partitions
