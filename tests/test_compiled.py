"""Clipped sums by a compiled program: those of one record at a time, whatever fills the last rows up."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from client.compiler import build, rows_for
from client.gradients import Unsupported, choose, clipped_sums, require
from client.program import Program
from tests.test_gradients import CLASSES, LOSS, Cancelling, alone, cancelling

ROWS = 4


class Peculiar(nn.Module):
    """What book-keeping refuses: a parameter of its own, a layer called twice; and a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("shift", torch.randn(6))
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x * self.scale + self.shift))
        return self.out(torch.tanh(self.layer(x + self.frozen)))


def sums(program: Program, model: nn.Module, inputs: Tensor, targets: Tensor, bound: float) -> Tensor:
    computed = clipped_sums("compiled", model, LOSS, bound, program)
    return torch.cat([part.flatten() for part in computed(inputs, targets)])


@pytest.mark.long
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_program_finds_the_sums_of_one_record_at_a_time(kind: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Peculiar().to(kind)
    program = build(model, LOSS, torch.randn(ROWS, 6, dtype=kind), torch.zeros(ROWS, dtype=torch.long), tmp_path)
    for _ in range(2):
        for batch in (0, 1, ROWS, 2 * ROWS + 3):
            inputs, targets = torch.randn(batch, 6, dtype=kind), torch.randint(CLASSES, (batch,))
            for bound in (1e-3, 0.5, 1e3):
                expected = alone(model, inputs, targets, bound)
                found = sums(program, model, inputs, targets, bound)
                assert found.dtype == kind
                assert (found.double() - expected).norm() <= 1e-4 * expected.norm() + 1e-9
        model = Peculiar().to(kind)  # a program knows no values, be they trained or not
    inputs, targets = torch.randn(2 * ROWS, 6, dtype=kind), torch.randint(CLASSES, (2 * ROWS,))
    for value in (math.nan, math.inf):
        poisoned = inputs.clone()
        poisoned[2] = value
        others = [i for i in range(len(inputs)) if i != 2]
        expected = alone(model, inputs[others], targets[others], 0.5)
        assert (sums(program, model, poisoned, targets, 0.5).double() - expected).norm() <= 1e-4 * expected.norm()
    require("compiled", model, LOSS, inputs, targets, 0.5, program)
    with pytest.raises(Unsupported, match="other sums than those of one record at a time"):
        require("compiled", model, lambda x, y: 2 * LOSS(x, y), inputs, targets, 1e3, program)


@pytest.mark.long
def test_a_program_lets_no_record_add_more_than_the_bound(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, targets = Cancelling(), torch.zeros(4, dtype=torch.long)
    inputs = cancelling(4, 8)
    program = build(model, LOSS, inputs, targets, tmp_path)
    whole = sums(program, model, inputs, targets, 1.0).double()
    for i in range(4):
        others = [j for j in range(4) if j != i]
        assert (whole - sums(program, model, inputs[others], targets[others], 1.0).double()).norm() <= 1 + 1e-3


def test_what_cannot_be_compiled_is_refused_in_one_line(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    with pytest.raises(Unsupported, match=r"the model draws random numbers \(dropout\)"):
        build(model, LOSS, torch.randn(ROWS, 6), torch.zeros(ROWS, dtype=torch.long), tmp_path)
    with pytest.raises(Unsupported, match=r"hooks: This layer has buffers.*; book_keeping: .*\(Peculiar\): no rule"):
        choose(Peculiar(), LOSS, torch.randn(ROWS, 6), torch.zeros(ROWS, dtype=torch.long), 1.0)
    with pytest.raises(Unsupported, match="nothing was compiled for this model"):
        require("compiled", model, LOSS, torch.randn(2, 6), torch.zeros(2, dtype=torch.long), 1.0)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (7, 1), (64, 8), (100, 8), (256, 32), (1000, 64)])
def test_rows_are_few_beside_a_batch(batch: int, rows: int) -> None:
    assert rows_for(batch) == rows
