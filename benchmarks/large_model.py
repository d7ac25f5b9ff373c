"""Digits by a model of 20 MB, for what depends on a model's size alone."""

from pathlib import Path

from torch import nn

from common.tasks.digits import Digits

SPEC = "benchmarks.large_model:large_model"
MEGABYTES = 20.0


class _Large(Digits):
    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8000), nn.ReLU(), nn.Linear(8000, 560), nn.ReLU(), nn.Linear(560, 10)
        )


def large_model(root: Path) -> Digits:
    return _Large(root)
