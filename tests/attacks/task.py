"""A task that a test rigs: the function that the file `order` under the data's root names is called before each job.

It runs in the worker, where it may change the task or, to show that a test sees it, take a guard out of the client;
before the next job all of that is undone.
"""

import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.tasks import Data
from common.tasks.digits import Digits


class Rigged(Digits):
    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(root, **options)
        self.patch = pytest.MonkeyPatch()
        # In the zygote, so before every fork: no noise may come of it.
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    def model(self) -> nn.Module:
        """Called for each job, before the charge."""
        self.patch.undo()
        path = self.root / "order"
        if path.exists() and (order := path.read_text()):
            module, _, name = order.partition(":")
            getattr(importlib.import_module(module), name)(self)
        return self.make_model()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.losses(outputs, targets)

    def train_data(self, partition: int, partitions: int) -> Data:
        """Called after the charge, where the worker served another partition before."""
        return self.owned(partition, partitions)

    # What an order replaces.

    def make_model(self) -> nn.Module:
        return super().model()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets)

    def owned(self, partition: int, partitions: int) -> Data:
        return super().train_data(partition, partitions)
