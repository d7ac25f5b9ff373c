"""What a worker does without: modules that every client would hold in memory, and no step needs."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from client.sgd import Sgd

ROOT = Path(__file__).parent.parent
HEAVY = (
    "scipy", "sympy", "pandas", "sklearn", "datasets", "matplotlib", "dp_accounting", "torch._dynamo",
    "torch._inductor", "torch.distributed.tensor", "opacus.accountants",
)  # fmt: skip
TRAINS = """
import importlib, sys
from pathlib import Path

{first}
importlib.import_module("client.job")
from client.gradients import MODES
from client.accounting import Release
from client.input_check import check_inputs
from client.model_check import check_model
from client.noise import SecureGenerator
from client.training import Step, train
from common.tasks.digits import Digits
from common.tasks.inputs import Inputs

task = Digits(Path())
data = task.train_data(3, 100)
inputs = Inputs.of(task)
check_inputs(inputs, data.inputs)
check_model(task.model(), task.loss, inputs.evaluation(data.inputs), data.targets)
for mode in ("hooks", "book_keeping"):
    train(
        task.model(), task.loss, data, release=Release(noise_multiplier=1.0, sample_rate=0.5, steps=2),
        step=Step(
            max_grad_norm=1.0, batch_size=7, physical_batch_size=4, learning_rate=0.1, gradient_mode=mode
        ),
        generator=SecureGenerator(), inputs=inputs,
    )
print(*sorted(set(sys.modules) & set({heavy!r})))
import opacus.privacy_engine, torch.distributed.tensor
print(opacus.privacy_engine.PrivacyEngine.make_private.__name__, torch.distributed.tensor.DTensor.__mro__[1].__name__)
"""


def loaded(first: str) -> tuple[set[str], str]:
    """Which heavy modules a worker has after its first rounds, and what it finds when it asks for some."""
    code = TRAINS.format(first=first, heavy=HEAVY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    modules, asked = found.splitlines()
    return set(modules.split()), asked


def test_a_worker_trains_without_what_it_does_not_need() -> None:
    modules, asked = loaded('importlib.import_module("client.lean_opacus")')
    assert modules == set()
    assert asked == "make_private Tensor"  # and whoever wants them still gets the true ones


def test_opacus_as_it_is_would_be_noticed() -> None:
    modules, _ = loaded("import opacus")
    assert {"scipy", "sympy", "opacus.accountants"} <= modules


def test_sgd_moves_as_pytorchs_does() -> None:
    torch.manual_seed(3)
    ours = nn.Linear(7, 5)
    theirs = nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    mine, reference = Sgd(ours.parameters(), lr=0.3), torch.optim.SGD(theirs.parameters(), lr=0.3)
    for _ in range(5):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 14).view(2, 7)).square().sum().backward()
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    mine.zero_grad()
    assert all(parameter.grad is None for parameter in ours.parameters())
    before = [parameter.clone() for parameter in ours.parameters()]
    mine.step()  # without gradients nothing moves
    assert all(map(torch.equal, before, ours.parameters()))
