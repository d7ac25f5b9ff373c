"""scikit-learn's 1797 handwritten digits: real, and inside a package, so the default needs no download."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import Tensor, nn

from common.tasks.classification import Classification
from common.tasks.protocol import Data

_SEED = 20240229  # public: it draws the test set


class Digits(Classification):
    """1437 digits to train on, 360 to test; 8x8 pixels of 0 to 16."""

    records = 1437

    def model(self) -> nn.Module:
        return nn.Sequential(Contrast(), nn.Linear(64, 10, bias=False))

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


class Contrast(nn.Module):
    """[n, 1, 8, 8] to [n, 64]: each digit less its own mean, at unit norm: one clipping norm fits all."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1).float()
        centred = pixels - pixels.mean(dim=1, keepdim=True)
        return centred / centred.norm(dim=1, keepdim=True).clamp_min(1)  # a blank digit stays zero
