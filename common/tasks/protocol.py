"""What a task must offer, and how one is found by name. It imports no torch, so a light process may ask."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from common.tasks.partition import dirichlet

if TYPE_CHECKING:
    from torch import Tensor, nn

_DIRICHLET = "_dirichlet"
_CLASSES = {
    "digits": "common.tasks.digits:Digits",
    "fashion_mnist": "common.tasks.fashion_mnist:FashionMnist",
    "cifar10": "common.tasks.cifar10:Cifar10",
}
_METHODS = ("model", "loss", "train_data", "test_data", "nominal_records")

# The Dirichlet split is a task of its own: its partitions, named after the task, get ledgers of their own.
SHIPPED = (*_CLASSES, *(name + _DIRICHLET for name in _CLASSES))


class TaskError(ValueError):
    """One line: the key `task`, its value, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Records as resident tensors; row i of both belongs to the same record."""

    inputs: Tensor  # [n, ...], raw: uint8 where it can be
    targets: Tensor  # [n] int64

    def __post_init__(self) -> None:
        if self.targets.ndim != 1 or len(self.inputs) != len(self.targets):
            shapes = tuple(self.inputs.shape), tuple(self.targets.shape)
            raise ValueError(f"expected one target per input, found shapes {shapes[0]} and {shapes[1]}")

    def __len__(self) -> int:
        return len(self.targets)


class Task(Protocol):
    """What a user brings. No record may influence another's output: the clipping bound rests on it.

    Optional, all on the device where the model is, and of each record by itself (common.tasks.inputs):

        def prepare(self, inputs: Tensor) -> Tensor
            Raw records [k, ...] to what the model takes, say uint8 pixels to floats: the server's evaluation, too.
        draws: int
        def augment(self, inputs: Tensor, draws: Tensor) -> Tensor
            A random change of raw records in training, before `prepare`; row i of `draws` [k, self.draws], independent
            numbers in [0, 1), is for record i. It may use no other chance.
    """

    def model(self) -> nn.Module:
        """Return a new model; it takes what `prepare` makes of `Data.inputs`, or them as they are without it."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per record, [n], not reduced: the DP clip needs each record's own gradient."""
        ...

    def train_data(self, partition: int, partitions: int) -> Data:
        """Return the private records of one partition of so many; ValueError when it is out of range."""
        ...

    def test_data(self) -> Data:
        """Return the public test set, on which the server evaluates."""
        ...

    def nominal_records(self, partitions: int) -> int:
        """Return the public, nominal size of a partition: a constant, never counted from private data."""
        ...


def load_task(spec: str, root: Path) -> Task:
    """Return the task `spec` names: one of `SHIPPED`, or `module:attribute`.

    The attribute is a class or a function, called with `root`, the folder of local data. Raises `TaskError`.
    """
    name = spec.removesuffix(_DIRICHLET)
    if name in _CLASSES:
        shipped = _attribute(_CLASSES[name])
        return cast(Task, shipped(root, split=dirichlet) if spec.endswith(_DIRICHLET) else shipped(root))
    if ":" not in spec:
        raise TaskError(f"task: unknown {spec!r}; expected one of {', '.join(SHIPPED)}, or module:attribute")
    task = _attribute(spec)(root)
    missing = [method for method in _METHODS if not callable(getattr(task, method, None))]
    if missing:
        raise TaskError(f"task: {spec!r} returned {type(task).__name__}, which lacks {', '.join(missing)}")
    _check_optional(spec, task)
    return cast(Task, task)


def _check_optional(spec: str, task: Any) -> None:
    for method in ("prepare", "augment"):
        if hasattr(task, method) and not callable(getattr(task, method)):
            raise TaskError(f"task: {spec!r}: {type(task).__name__}.{method} is no method")
    draws = getattr(task, "draws", None)
    if hasattr(task, "augment") and not (isinstance(draws, int) and draws >= 1):
        found = f"{type(task).__name__}.augment"
        raise TaskError(f"task: {spec!r}: {found} needs draws, 1 or more for each record, found {draws!r}")


def _attribute(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        fix = "the module and what it imports must be installed or on PYTHONPATH"
        raise TaskError(f"task: {spec!r}: cannot import {module_name!r}: {error}; {fix}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise TaskError(f"task: {spec!r}: {module_name} has no class or function {name!r}")
    return cast(Callable[..., Any], found)
