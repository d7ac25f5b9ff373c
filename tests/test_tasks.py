"""Tasks: real data where installed, splits that never change, models in which no record meets another."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner
from sklearn.datasets import load_digits
from torch import nn
from torchvision.datasets import CIFAR10

from common.tasks import SHIPPED, Data, TaskError, load_task
from common.tasks.cifar10 import Cifar10
from common.tasks.digits import Digits, _digits
from common.tasks.fashion_mnist import DEBIAN, FashionMnist
from common.tasks.inputs import Inputs
from common.tasks.partition import dirichlet, iid

LABELS = torch.arange(1437) % 10
SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
debian = pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")


def images(name: str, records: int = 6, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 17 if name == "digits" else 256, (records, *SHAPES[name]), generator=draw).byte()


# Data


def test_digits_are_the_real_ones(tmp_path: Path) -> None:
    task = Digits(tmp_path)
    train, test = task.load(train=True), task.test_data()
    assert (len(train), len(test)) == (1437, 360)
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert (train.inputs.dtype, train.targets.dtype) == (torch.uint8, torch.int64)
    assert train.inputs.max() == 16
    assert train.targets.unique().tolist() == list(range(10))
    everyone = torch.cat([train.inputs, test.inputs]).flatten(1)
    assert len(everyone.unique(dim=0)) == 1797  # no test digit is also trained on


def test_the_digits_can_be_learned(tmp_path: Path) -> None:
    """Without noise the model must leave room for noise; against shuffled labels it must learn nothing."""
    task, generator = Digits(tmp_path), torch.Generator().manual_seed(0)
    train, test = task.load(train=True), task.test_data()
    seen, unseen = (task.prepare(part.inputs) for part in (train, test))

    def accuracy(targets: torch.Tensor) -> float:
        model = task.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        for _ in range(100):
            optimizer.zero_grad()
            task.loss(model(seen), targets).mean().backward()
            optimizer.step()
        return (model(unseen).argmax(1) == test.targets).float().mean().item()

    assert accuracy(train.targets) > 0.93
    assert accuracy(train.targets[torch.randperm(len(train), generator=generator)]) < 0.4


@debian
def test_fashion_mnist_is_the_real_one(tmp_path: Path) -> None:
    task = FashionMnist(tmp_path)
    part, test = task.train_data(3, 600), task.test_data()
    assert part.inputs.shape == (100, 1, 28, 28)
    assert (part.inputs.dtype, part.targets.dtype) == (torch.uint8, torch.int64)
    assert test.inputs.shape == (10_000, 1, 28, 28)
    assert test.targets.bincount().tolist() == [1000] * 10
    assert not list(tmp_path.rglob("*.[0-9]*"))  # no half-unpacked file stays


def test_missing_fashion_mnist_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.tasks.fashion_mnist.DEBIAN", tmp_path / "absent")
    with pytest.raises(TaskError, match=r"train-images-idx3-ubyte.*FashionMNIST/raw.*dataset-fashion-mnist"):
        FashionMnist(tmp_path).test_data()


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Three records a file in CIFAR's format; torchvision learns their digests, its loader stays as it is."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    rows = np.random.RandomState(0).randint(0, 256, (len(names), 3, 3072)).astype(np.uint8)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    files = [
        [name, write(name, {"data": row, "labels": [i, 1, 9]})]
        for i, (name, row) in enumerate(zip(names, rows, strict=True))
    ]
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(CIFAR10, "test_list", files[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return rows


def test_cifar_is_read_by_torchvision(tmp_path: Path, small_cifar: np.ndarray) -> None:
    train, test = Cifar10(tmp_path).load(train=True), Cifar10(tmp_path).test_data()
    assert (train.inputs.dtype, train.targets.dtype) == (torch.uint8, torch.int64)
    assert train.inputs.is_contiguous()
    assert np.array_equal(train.inputs.numpy(), small_cifar[:5].reshape(15, 3, 32, 32))  # red plane first
    assert train.targets.tolist() == [0, 1, 9, 1, 1, 9, 2, 1, 9, 3, 1, 9, 4, 1, 9]
    assert test.targets.tolist() == [5, 1, 9]


@pytest.mark.usefixtures("small_cifar")
def test_missing_or_damaged_cifar_names_the_files(tmp_path: Path) -> None:
    (tmp_path / CIFAR10.base_folder / "data_batch_3").write_bytes(b"not the pickle that was digested")
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TaskError, match=r"task: 'cifar10'.*data_batch_1 to.*cifar-10-batches-py"):
            Cifar10(root).test_data()


def test_data_refuses_records_without_a_target() -> None:
    with pytest.raises(ValueError, match=r"one target per input.*\(3, 2\) and \(2,\)"):
        Data(inputs=torch.zeros(3, 2), targets=torch.zeros(2))


# Partitions


@pytest.mark.parametrize("split", [iid, dirichlet])
@pytest.mark.parametrize("partitions", [1, 2, 7, 10])
def test_partitions_are_disjoint_and_cover_everything(split, partitions: int) -> None:
    found = [index for partition in range(partitions) for index in split(LABELS, partition, partitions)]
    assert sorted(found) == list(range(len(LABELS)))


@pytest.mark.parametrize("split", [iid, dirichlet])
def test_a_partition_is_always_the_same(split) -> None:
    assert split(LABELS, 3, 10) == split(LABELS, 3, 10)
    assert split(LABELS, 3, 10) != split(LABELS, 4, 10)


@pytest.mark.parametrize("partitions", [1, 2, 7, 10, 333])
def test_iid_shares_are_those_of_flowers_partitioner(partitions: int) -> None:
    order = np.random.RandomState(20240229).permutation(len(LABELS))
    flowers = IidPartitioner(num_partitions=partitions)
    flowers.dataset = Dataset.from_dict({"index": order})
    for partition in range(partitions):
        assert iid(LABELS, partition, partitions) == list(flowers.load_partition(partition)["index"])


def test_digits_are_those_of_scikit_learn() -> None:
    bunch = load_digits()
    images, labels = _digits()
    assert np.array_equal(images, bunch.images)
    assert np.array_equal(labels, bunch.target)


def test_a_record_never_moves_to_another_partition() -> None:
    """It would be charged to another ledger, so the split must outlive releases of the libraries."""

    def digest(split) -> str:
        return hashlib.sha256(str([split(LABELS, i, 10) for i in range(10)]).encode()).hexdigest()[:16]

    assert digest(iid) == "823e0141e4917b06"
    assert digest(dirichlet) == "0ebd7e0737416eca"


def skew(split) -> float:
    """Pearson's chi-squared of partition by label; under independence it has 81 degrees of freedom."""
    counts = torch.stack([LABELS[split(LABELS, i, 10)].bincount(minlength=10) for i in range(10)]).double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_dirichlet_is_skewed_and_iid_is_not() -> None:
    assert 30 < skew(iid) < 140  # mean 81, standard deviation 12.7
    assert skew(dirichlet) > 1000


@pytest.mark.parametrize("split", [iid, dirichlet])
@pytest.mark.parametrize(
    ("partition", "partitions", "named"),
    [(-1, 2, "partition=-1"), (2, 2, "partition=2"), (0, 0, "partitions=0")],
)
def test_a_partition_out_of_range_is_refused(split, partition: int, partitions: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        split(LABELS, partition, partitions)


def test_dirichlet_refuses_partitions_without_a_record() -> None:
    with pytest.raises(ValueError, match=r"partitions=1437.*use fewer"):
        dirichlet(LABELS, 0, 1437)


def test_the_nominal_size_is_public(tmp_path: Path) -> None:
    assert Digits(tmp_path).nominal_records(10) == 143
    assert Cifar10(tmp_path / "absent").nominal_records(10) == 5000  # asks no data
    with pytest.raises(ValueError, match="partitions=0"):
        Digits(tmp_path).nominal_records(0)


# Models


def mixes_records(model: nn.Module, inputs: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the output of the first record changes with the rest of its batch."""
    model.train()
    with torch.no_grad():
        before, after = (model(torch.cat([inputs[:1], rest])) for rest in (inputs[1:], others))
    return not torch.allclose(before[0], after[0], atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_no_model_mixes_records(name: str, tmp_path: Path) -> None:
    task = load_task(name, tmp_path)
    inputs, others = (Inputs.of(task).evaluation(images(name, seed=seed)) for seed in (0, 1))
    assert not mixes_records(task.model(), inputs, others)


def test_the_mixing_test_notices_batch_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    assert mixes_records(model, images("digits").float(), images("digits", seed=1).float())


@pytest.mark.parametrize("name", SHAPES)
def test_models_hold_no_state_but_their_parameters(name: str, tmp_path: Path) -> None:
    model = load_task(name, tmp_path).model()
    assert list(model.buffers()) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_opacus_finds_the_gradient_of_each_loss(name: str, tmp_path: Path) -> None:
    """Oracle: autograd, one record at a time."""
    from opacus import GradSampleModule

    task, targets = load_task(name, tmp_path), torch.arange(6)
    inputs = Inputs.of(task).evaluation(images(name))
    model = task.model()
    single = []
    for i in range(len(targets)):
        loss = task.loss(model(inputs[i : i + 1]), targets[i : i + 1]).sum()
        single.append(torch.autograd.grad(loss, list(model.parameters())))
    hooked = GradSampleModule(model, loss_reduction="sum")
    losses = task.loss(hooked(inputs), targets)
    assert losses.shape == (6,)
    losses.sum().backward()
    for parameter, expected in zip(model.parameters(), zip(*single, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(expected), rtol=1e-3, atol=1e-5)


# Names


def test_every_shipped_name_loads(tmp_path: Path) -> None:
    assert {type(load_task(name, tmp_path)) for name in SHIPPED} == {Digits, FashionMnist, Cifar10}
    plain, skewed = (load_task(name, tmp_path).train_data(0, 10) for name in ("digits", "digits_dirichlet"))
    assert plain.targets.tolist() != skewed.targets.tolist()


class OwnTask(Digits):
    """What a user might bring; found below under this module's name."""


class StillTask(Digits):
    """Its `augment` has no random numbers to go by."""

    augment = staticmethod(torch.add)


class StiffTask(Digits):
    prepare = torch.zeros(1)  # type: ignore[assignment]


class HalfTask:
    def __init__(self, _: Path) -> None:
        self.model = nn.Identity

    def loss(self) -> None: ...


def test_a_user_brings_a_task(tmp_path: Path) -> None:
    task = load_task(f"{__name__}:OwnTask", tmp_path)
    assert isinstance(task, OwnTask)
    assert task.root == tmp_path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown 'digit'; expected one of digits, .*cifar10_dirichlet, or module:attribute"),
        ("", "unknown ''"),
        ("absent_module:Task", "cannot import 'absent_module'.*PYTHONPATH"),
        (":Task", "cannot import ''"),
        (f"{__name__}:Absent", "no class or function 'Absent'"),
        (f"{__name__}:LABELS", "no class or function 'LABELS'"),
        (f"{__name__}:StillTask", "StillTask.augment needs draws, 1 or more for each record, found None"),
        (f"{__name__}:StiffTask", "StiffTask.prepare is no method"),
        (f"{__name__}:HalfTask", "returned HalfTask, which lacks train_data, test_data, nominal_records"),
    ],
)
def test_a_bad_name_is_one_clear_line(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"^task: .*{message}") as refused:
        load_task(spec, tmp_path)
    assert "\n" not in str(refused.value)
