"""The task that is audited: canaries, each the only record with a gradient in its own coordinate of the update.

A canary's gradient lies half in `left` and half in `right`, far above the clip in each: it is the strongest record
that there can be, and it stays one only where the clip is over all parameters together. Two further parameters have
gradients of zero for every record: what a client sends of them is noise alone.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.tasks import Data

SPEC = "audit.canaries:Canaries"
LEFT, RIGHT = "left.weight", "right.weight"  # [canaries, 1] each
SILENT = ("silent.0.weight", "silent.1.weight")  # [silent, 1] each
_INCLUDED, _SIZES = "included.npy", "sizes.npy"
_LOUDNESS = 100.0  # a canary's gradient norm over the clip, about


def place(root: Path, included: np.ndarray, *, silent: int, max_grad_norm: float) -> None:
    """Lays out the data of a trial in `root`: which canaries are records, bool [canaries], and the sizes."""
    np.save(root / _INCLUDED, included)
    np.save(root / _SIZES, np.array([len(included), silent, _LOUDNESS * max_grad_norm]))


class Canaries:
    """A `Task` whose private records are the numbers of the included canaries."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def model(self) -> nn.Module:
        return _Board(*(int(size) for size in self._sizes()[:2]))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        return -float(self._sizes()[2]) * outputs  # a step raises the parameters of those who took part

    def train_data(self, partition: int, partitions: int) -> Data:  # noqa: ARG002
        return _records(np.flatnonzero(np.load(self._root / _INCLUDED)))

    def test_data(self) -> Data:
        return _records(np.arange(4))

    def nominal_records(self, partitions: int) -> int:  # noqa: ARG002
        return int(self._sizes()[0]) // 2

    def _sizes(self) -> np.ndarray:
        return np.load(self._root / _SIZES)


class _Board(nn.Module):
    def __init__(self, canaries: int, silent: int) -> None:
        super().__init__()
        self.left = nn.Embedding(canaries, 1)
        self.right = nn.Embedding(canaries, 1)
        self.silent = nn.ModuleList([nn.Linear(1, silent, bias=False) for _ in SILENT])

    def forward(self, numbers: Tensor) -> Tensor:
        """Canary numbers int64 [n] to one output each, float [n]."""
        heard = self.left(numbers) + self.right(numbers)  # [n, 1]
        nothing = torch.zeros_like(heard)
        for layer in self.silent:
            heard = heard + layer(nothing).sum(dim=1, keepdim=True)
        return heard.squeeze(1)


def _records(numbers: np.ndarray) -> Data:
    chosen = torch.from_numpy(numbers.astype(np.int64))
    return Data(inputs=chosen, targets=torch.zeros_like(chosen))
