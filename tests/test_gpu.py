"""Sharing a GPU, as far as it can be seen without one: shares, rehearsals before a charge, memory that runs out."""

import copy
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from client import app, gpu
from client.gradients import MODES
from client.gradients.hooks import Hooks
from client.noise import SecureGenerator
from client.policy import Refused
from client.training import train
from common.config import Policy, Training
from common.messages import Proposal, Reason, request
from tests.test_training import LOSS, RECORDS, Chosen, by_hand, data, flat, network, release, step


class Short:
    """A GPU with room for so many records in a pass."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []

    def __call__(self, inputs: Tensor, _: Tensor) -> None:
        self.sizes.append(len(inputs))
        if len(inputs) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("workers", "fraction", "expected"), [(1, None, 1.0), (4, None, 0.25), (4, 0.1, 0.1)])
def test_a_worker_has_its_share(workers: int, fraction: float | None, expected: float) -> None:
    assert gpu.share(Training(max_workers=workers, gpu_memory_fraction=fraction)) == expected


@pytest.mark.parametrize(("room", "found"), [(256, 256), (255, 128), (1, 1)])
def test_a_rehearsal_finds_what_fits(room: int, found: int) -> None:
    short = Short(room)
    size = gpu.rehearse(short, torch.zeros(5, 2), torch.zeros(5), most=256, records=10)
    assert size == found == short.sizes[-1]


def test_where_nothing_fits_it_refuses() -> None:
    with pytest.raises(Refused, match="no room for one record") as refused:
        gpu.rehearse(Short(0), torch.zeros(5, 2), torch.zeros(5), most=256, records=10)
    assert refused.value.reason is Reason.MEMORY


@pytest.mark.parametrize("room", [5, 3, 1])
def test_memory_that_runs_out_halves_the_pass_and_leaves_the_step_alone(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Tight(Hooks):
        def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
            sizes.append(len(inputs))
            if len(inputs) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(inputs, targets)

    monkeypatch.setitem(MODES, "hooks", Tight)
    batches = [list(range(RECORDS)), [3], [], [1, 5, 8, 20]]
    model, how = network(), step(physical_batch_size=16)
    expected = by_hand(copy.deepcopy(model), data(), batches, how)
    train(model, LOSS, data(), release=release(4), step=how, generator=Chosen(batches))
    assert torch.allclose(flat(model).double(), flat(expected), atol=2e-6)
    assert sizes.count(16) == 1  # what fits is remembered


def test_memory_for_not_even_one_record_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class None_(Hooks):
        def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:  # noqa: ARG002
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(MODES, "hooks", None_)
    with pytest.raises(torch.OutOfMemoryError):
        train(network(), LOSS, data(), release=release(1), step=step(), generator=SecureGenerator())


class Untouched:
    """A budget that nobody may charge."""

    def reserve(self, *_: Any) -> None:
        raise AssertionError("charged before it was known whether a pass fits")

    commit = standing = reserve


@pytest.mark.parametrize("where", ["share", "rehearsal"])
def test_it_refuses_before_it_charges(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def no_room(*_: Any, **__: Any) -> int:
        if where == "share":
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise Refused(Reason.MEMORY, "no room")

    monkeypatch.setattr(gpu, "is_shared", lambda _: True)
    monkeypatch.setattr(gpu, "give_back", lambda _: None)
    monkeypatch.setattr(gpu, "keep_to_share", no_room if where == "share" else lambda *_: None)
    monkeypatch.setattr(gpu, "rehearse", no_room)
    policy = Policy.model_validate(
        {
            "task": "digits", "data_root": tmp_path, "training": {"device": "cpu"},
            "privacy": {
                "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.0, "max_grad_norm": 0.5, "batch_size": 64,
                "records": 718, "max_steps_per_round": 4,
            },
            "partitions": [{"name": "digits-0-of-2", "index": 0, "of": 2}],
        }
    )  # fmt: skip
    bench = app.Bench(policy=policy)
    parameters = app.trainable(bench.task().model())
    arrays = ArrayRecord({name: Array(value.detach().numpy()) for name, value in parameters.items()})
    proposal = Proposal(task="digits", round=1, steps=1, learning_rate=1.0, anchor_sequence=0, anchor_head="")
    with pytest.raises(Refused) as refused:
        app.train_round(request(arrays, proposal), "message", bench, policy.partitions[0], Untouched())
    assert refused.value.reason is Reason.MEMORY
