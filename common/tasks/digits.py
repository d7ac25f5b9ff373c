"""scikit-learn's 1797 handwritten digits: real, and inside a package, so the default needs no download."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import Tensor, nn
from torch.nn import functional

from common.tasks.classification import Classification
from common.tasks.protocol import Data

_SEED = 20240229  # public: it draws the test set
_UNIT = torch.full((1, 8, 8), 1 / 8)  # layer norm gives each of 64 pixels variance 1, so the norm 8
_CALM = 1e-6  # of a variance, which is 0.016 for the faintest digit that is not blank


class Digits(Classification):
    """1437 digits to train on, 360 to test; 8x8 pixels of 0 to 16."""

    records = 1437

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))

    def prepare(self, inputs: Tensor) -> Tensor:
        """Each digit less its own mean, at unit norm: one clipping norm fits all. A blank one stays zero."""
        return functional.layer_norm(inputs.float(), inputs.shape[1:], _UNIT.to(inputs.device), None, _CALM)

    def load(self, *, train: bool) -> Data:
        bunch = _digits()
        order = np.random.RandomState(_SEED).permutation(len(bunch.target))
        chosen = order[: self.records] if train else order[self.records :]
        images = torch.from_numpy(bunch.images[chosen].astype(np.uint8)).unsqueeze(1)
        return Data(inputs=images, targets=torch.from_numpy(bunch.target[chosen].astype(np.int64)))


@cache
def _digits() -> Bunch:
    """Parsed once: a worker that serves many partitions would otherwise spend most of its time on it."""
    return load_digits()
