"""scikit-learn's 1797 handwritten digits: real, and inside a package, so the default needs no download."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.tasks.classification import Classification
from common.tasks.protocol import Data, TaskError

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
        images, labels = _digits()
        order = np.random.RandomState(_SEED).permutation(len(labels))
        chosen = order[: self.records] if train else order[self.records :]
        return Data(inputs=torch.from_numpy(images[chosen]).unsqueeze(1), targets=torch.from_numpy(labels[chosen]))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 [n, 8, 8], and classes, int64 [n].

    Read from scikit-learn's own file, as its `load_digits` does: to import it would cost each client 45 MB. Parsed
    once: a worker that serves many partitions would otherwise spend most of its time on it.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise TaskError("task: 'digits' needs scikit-learn, whose package holds the data: install it")
    rows = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.uint8)
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
