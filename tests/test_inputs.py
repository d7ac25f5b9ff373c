"""From raw records to the model's input: as defined, of each record by itself, by chance in training alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from client import app
from client.fingerprint import fingerprint, owner_key
from client.input_check import check_inputs
from client.model_check import ModelRefused
from client.policy import Refused
from client.training import train
from common.config import Policy
from common.messages import Proposal, Reason, request
from common.tasks import load_task
from common.tasks.augment import flip_and_crop
from common.tasks.digits import Digits
from common.tasks.inputs import Inputs
from server.evaluation import Evaluation
from tests.test_gpu import Untouched
from tests.test_tasks import SHAPES, images
from tests.test_training import LOSS, RECORDS, Chosen, data, flat, network, release, step

# What each makes of an image: the definition, one image at a time


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_pixels_become_floats_around_zero(name: str, tmp_path: Path) -> None:
    pixels = images(name)
    found = Inputs.of(load_task(name, tmp_path)).evaluation(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), pixels.double() / 127.5 - 1, rtol=0, atol=1e-6)


def test_a_digit_is_centred_at_unit_norm(tmp_path: Path) -> None:
    faint = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    faint[0, 0, 3, 3], faint[1] = 1, 16
    digits = torch.cat([images("digits"), faint])
    found = Digits(tmp_path).prepare(digits).flatten(1).double()
    centred = digits.flatten(1).double() - digits.flatten(1).double().mean(1, keepdim=True)
    expected = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-9)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not found[-2:].any()  # those of one shade stay zero


@pytest.mark.parametrize(("shape", "border"), [((1, 8, 8), 1), ((3, 5, 7), 2), ((2, 3, 4), 0), ((3, 32, 32), 4)])
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_flip_and_crop_is_cut_out_of_its_own_image(
    shape: tuple[int, int, int], border: int, count: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(count)
    _, height, width = shape
    pictures, draws = torch.randint(1, 256, (count, *shape)).to(dtype), torch.rand(count, 3)
    if dtype.is_floating_point:
        pictures[0].fill_(torch.nan)  # which a product with zero would bring into the images beside it
    draws[0], draws[-1] = 0.0, 1 - 2**-24  # the least and the largest that torch.rand gives
    found = flip_and_crop(pictures, border, draws)
    for i, (picture, (mirror, down, right)) in enumerate(zip(pictures, draws.tolist(), strict=True)):
        padded = torch.zeros(shape[0], height + 2 * border, width + 2 * border, dtype=dtype)
        padded[:, border : border + height, border : border + width] = picture.flip(2) if mirror < 0.5 else picture
        top, left = int(down * (2 * border + 1)), int(right * (2 * border + 1))
        expected = padded[:, top : top + height, left : left + width]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=0, equal_nan=True)


# Of each record by itself


class Grey:
    """A task's part in it, as bad as the methods below."""

    draws = 2

    def batch_mean(self, inputs: Tensor) -> Tensor:
        return inputs.float() - inputs.float().mean()

    def by_number(self, inputs: Tensor) -> Tensor:
        return inputs.float() / len(inputs)

    def first(self, inputs: Tensor) -> Tensor:
        return inputs[:1].float()

    def one_at_a_time(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(1, 1, 8, 8).float()

    def mixup(self, inputs: Tensor, draws: Tensor) -> Tensor:
        return (inputs * draws[:, 0].view(-1, 1, 1, 1) + inputs.roll(1, 0) * (1 - draws[:, 0]).view(-1, 1, 1, 1)).byte()

    def mixup_at_times(self, inputs: Tensor, draws: Tensor) -> Tensor:
        return inputs.roll(1, 0) if draws[0, 0] < 0.3 else inputs

    def by_the_others_draws(self, inputs: Tensor, draws: Tensor) -> Tensor:
        return inputs.float() * draws[:, 0].roll(1, 0).view(-1, 1, 1, 1)

    def other_chance(self, inputs: Tensor, draws: Tensor) -> Tensor:  # noqa: ARG002
        return inputs * torch.rand(len(inputs), 1, 1, 1)

    def __init__(self) -> None:
        self.seen = torch.zeros(())

    def running_mean(self, inputs: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * inputs.float().mean()
        return inputs.float() - self.seen


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("batch_mean", "prepare mixes records"),
        ("running_mean", "prepare mixes records"),
        ("by_number", "prepare depends on the number of records"),
        ("first", r"prepare must return a tensor, a row for each of 5 records, found \[1, "),
        ("one_at_a_time", "prepare fails on 5 records at a time"),
        ("mixup", "augment mixes records"),
        ("mixup_at_times", "augment mixes records"),
        ("by_the_others_draws", "augment mixes records"),
        ("other_chance", "augment (mixes records|depends on the number of records in the batch, or on random numbers)"),
    ],
)
def test_what_mixes_records_is_refused(method: str, message: str) -> None:
    part = getattr(Grey(), method)
    inputs = Inputs(augment=part, draws=2) if "augment" in message else Inputs(prepare=part)
    with pytest.raises(ModelRefused, match=f"^the task's {message}"):
        check_inputs(inputs, images("digits"))


@pytest.mark.parametrize("name", SHAPES)
def test_the_shipped_tasks_pass_and_chance_stays_as_it_was(name: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    check_inputs(Inputs.of(load_task(name, tmp_path)), images(name))
    assert torch.equal(torch.get_rng_state(), before)


class Mixing(Digits):
    draws = 1

    def augment(self, inputs: Tensor, draws: Tensor) -> Tensor:
        return torch.where(draws.view(-1, 1, 1, 1) < 0.5, inputs, inputs.flip(0))


class Shifted(Digits):
    draws = 3

    def augment(self, inputs: Tensor, draws: Tensor) -> Tensor:
        return flip_and_crop(inputs, 1, draws)


def policy(task: type, folder: Path) -> Policy:
    return Policy.model_validate(
        {
            "task": f"{task.__module__}:{task.__name__}", "data_root": folder, "training": {"device": "cpu"},
            "privacy": {
                "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.0, "max_grad_norm": 0.5, "batch_size": 64,
                "records": 718, "max_steps_per_round": 4,
            },
            "client": {"state": folder},
            "partitions": [{"name": "digits-0-of-2", "index": 0, "of": 2}],
        }
    )  # fmt: skip


def test_a_task_that_mixes_records_is_refused_before_a_charge(tmp_path: Path) -> None:
    terms = policy(Mixing, tmp_path)
    arrays = ArrayRecord({"1.weight": Array(torch.zeros(10, 64).numpy())})
    proposal = Proposal(task=terms.task, round=1, steps=1, learning_rate=1.0, anchor_sequence=0, anchor_head="")
    with pytest.raises(Refused, match="augment mixes records") as refused:
        app.train_round(request(arrays, proposal), "m", app.Bench(policy=terms), terms.partitions[0], Untouched())
    assert refused.value.reason is Reason.MODEL


# In training alone


def test_records_stay_raw_and_are_recognized_as_they_are(tmp_path: Path) -> None:
    bench = app.Bench(policy=policy(Shifted, tmp_path))
    resident = bench.data(bench.policy.partitions[0], torch.device("cpu"))
    raw = Digits(tmp_path).train_data(0, 2)
    assert resident.inputs.dtype == torch.uint8
    assert torch.equal(resident.inputs, raw.inputs)
    assert bench.fingerprint == fingerprint(raw, owner_key(tmp_path))
    bench.plan(torch.device("cpu"))
    assert torch.equal(resident.inputs, raw.inputs)


class Loud(Digits):
    """What the server must never call."""

    draws = 1

    def augment(self, *_: Tensor) -> Tensor:
        raise AssertionError("augmented in an evaluation")


def test_the_server_evaluates_on_what_is_prepared_and_not_augmented(tmp_path: Path) -> None:
    task = Loud(tmp_path)
    evaluation = Evaluation(task, seed=0)
    weight = torch.randn(10, 64)
    test = task.test_data()
    expected = (task.prepare(test.inputs).flatten(1) @ weight.T).argmax(1) == test.targets
    accuracy, _ = evaluation.measure({"1.weight": weight.numpy()})
    assert accuracy == pytest.approx(float(expected.float().mean()))


def trained(inputs: Inputs, physical: int, batches: list[list[int]], seed: int = 0) -> Tensor:
    model = network()
    torch.manual_seed(seed)
    how = step(physical_batch_size=physical)
    train(model, LOSS, data(), release=release(len(batches)), step=how, generator=Chosen(batches), inputs=inputs)
    return flat(model)


NOISY = Inputs(augment=lambda raw, draws: raw * draws.view(-1, 1, 1, 1), draws=1)
BATCHES: list[list[int]] = [list(range(RECORDS)), [3], [], [1, 5, 8, 20]]


@pytest.mark.parametrize("physical", [1, 3, 16, 1000])
def test_the_parts_of_a_batch_leave_its_augmentation_alone(physical: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's random numbers are its own in each step, however the batch is split."""
    torch.testing.assert_close(trained(NOISY, physical, BATCHES), trained(NOISY, 7, BATCHES), rtol=0, atol=2e-6)
    assert not torch.allclose(trained(NOISY, 7, BATCHES), trained(NOISY, 7, BATCHES, seed=1), atol=1e-4)
    # Negative control: numbers that go by the place in a part differ from those that go by the record.
    if physical < RECORDS:
        monkeypatch.setattr(Inputs, "training", lambda self, raw, draws: self.augment(raw, draws.flip(0)))
        assert not torch.allclose(trained(NOISY, physical, BATCHES), trained(NOISY, 1000, BATCHES), atol=1e-4)


def test_each_step_draws_anew_for_each_record() -> None:
    seen: list[Tensor] = []

    def noting(raw: Tensor, draws: Tensor) -> Tensor:
        seen.append(draws.clone())
        return raw

    trained(Inputs(augment=noting, draws=3), 1000, [[0, 1, 2, 3]] * 5)
    numbers = torch.cat(seen).flatten()
    assert numbers.shape == (60,)
    assert len(numbers.unique()) == 60


def test_a_task_without_them_works_as_before() -> None:
    class Plain:
        pass

    raw = images("digits")
    inputs = Inputs.of(Plain())  # type: ignore[arg-type]
    assert inputs.training(raw, inputs.draw(len(raw), raw.device)) is raw
    assert inputs.evaluation(raw) is raw
    check_inputs(inputs, raw)


def test_training_on_prepared_records_is_training_with_it_as_the_first_layer() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3 - 1

    model = network()
    whole = nn.Sequential(First(), copy.deepcopy(model))
    raw: dict[str, Any] = {"release": release(4), "step": step()}
    train(whole, LOSS, data(), generator=Chosen(BATCHES), **raw)
    train(model, LOSS, data(), generator=Chosen(BATCHES), inputs=Inputs(prepare=First()), **raw)
    torch.testing.assert_close(flat(model), flat(whole), rtol=0, atol=1e-6)
