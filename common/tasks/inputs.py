"""From records as they lie in memory to what the model takes: augmented in training, then prepared, on their device.

A record's result is a function of that record and of its own random numbers alone (client.input_check refuses others):
the clip bounds the gradient of one record, and a record that entered another's input would be in two gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from common.tasks.protocol import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A task's way, or none at all: then the model takes the records as they are."""

    prepare: Callable[[Tensor], Tensor] | None = None
    augment: Callable[[Tensor, Tensor], Tensor] | None = None
    draws: int = 0  # random numbers that `augment` takes per record

    @classmethod
    def of(cls, task: Task) -> Inputs:
        augment = getattr(task, "augment", None)
        draws = getattr(task, "draws", 0) if augment else 0
        return cls(prepare=getattr(task, "prepare", None), augment=augment, draws=draws)

    def draw(self, records: int, device: torch.device) -> Tensor:
        """Independent numbers in [0, 1) from torch's generator, [records, draws]: one row for each record."""
        return torch.rand(records, self.draws, device=device)

    def training(self, raw: Tensor, draws: Tensor) -> Tensor:
        """What the model takes of the records `raw` [k, ...], which may be overwritten; `draws` as `draw` made them."""
        if self.augment is not None and len(raw):
            raw = self.augment(raw, draws)
        return self.evaluation(raw)

    def evaluation(self, raw: Tensor) -> Tensor:
        """The same without chance."""
        return raw if self.prepare is None or not len(raw) else self.prepare(raw)


AS_THEY_ARE = Inputs()
