"""Attack: tell by the last bits of what is released whether a record is there (Mironov 2012; Haney et al. 2022).

What holds: the sum of gradients and noise is rounded to a grid that depends on the noise's scale alone, so that both
cases release points of one grid; without it a single round of this model tells them apart for certain.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from client.noise import SecureGenerator
from client.training import Step, train
from common.tasks import Data
from tests.statistics_checks import normal_checks, rejected
from tests.test_training import Still, flat, release

SIZE, CLIP, NOISE = 1_000_000, 0.5, 1.5
STD = NOISE * CLIP
GRID = 2.0 ** (math.floor(math.log2(STD)) - 24)
SHARE = CLIP / SIZE**0.5  # of the one record in each coordinate of the sum: 2**-11 to 2**-10


def released(generator: SecureGenerator, *, present: bool) -> np.ndarray:
    """What one step sends from a model at zero, where one record is there or one without a gradient."""
    model = Still(SIZE)
    data = Data(inputs=torch.full((1, 1), float(present)), targets=torch.zeros(1, dtype=torch.int64))
    how = Step(max_grad_norm=CLIP, batch_size=1, physical_batch_size=1, learning_rate=1.0)
    terms = release(1, noise_multiplier=NOISE)
    train(model, lambda outputs, _: outputs.sum(1), data, release=terms, step=how, generator=generator)
    return flat(model).numpy().astype(np.float64)


def finer_than(values: np.ndarray, unit: float) -> int:
    """How many of the values are no multiple of `unit`."""
    return int((np.mod(values, unit) != 0).sum())


def test_both_cases_release_points_of_one_grid() -> None:
    for present in (True, False):
        values = released(SecureGenerator(), present=present)
        assert finer_than(values, GRID) == 0
        assert finer_than(values, 2 * GRID) > SIZE / 10  # and of no coarser one
        assert rejected(normal_checks(values + SHARE * present, STD)) == {}


class Textbook(SecureGenerator):
    """The noise that is added in the model's own type, as everybody does it."""

    def noised(self, total: Tensor, std: float) -> Tensor:
        return total + self.normal(total.shape, std, dtype=total.dtype)


def test_without_the_grid_the_last_bits_tell() -> None:
    """The control: near zero a sum is a multiple of the last bit of its larger summands, and noise alone is not."""
    unit = 2.0 ** (math.floor(math.log2(0.75 * SHARE)) - 23)
    near = {}
    for present in (True, False):
        values = released(Textbook(), present=present)
        near[present] = values[np.abs(values) < SHARE / 4]
        assert len(near[present]) > 50
    assert finer_than(near[True], unit) == 0
    assert finer_than(near[False], unit) > len(near[False]) / 4


@pytest.mark.parametrize("std", [1e-3, 0.3, 1.0, 2.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_grid_follows_the_noise_and_nothing_else(std: float, dtype: torch.dtype) -> None:
    grid = 2.0 ** (math.floor(math.log2(std)) - 24)
    total = torch.linspace(-3, 3, 1001).to(dtype) * std
    values = SecureGenerator().noised(total, std)
    assert values.dtype == dtype
    assert finer_than(values.double().numpy(), grid) == 0 or dtype == torch.float16
    assert torch.equal(SecureGenerator().noised(total, 0.0), total)
