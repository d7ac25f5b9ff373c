"""Digits whose owner's machine misbehaves on order: the word in the file `order` under the data's root."""

import os
import signal
import time

import torch
from torch import nn

from client import app
from client.noise import SecureGenerator
from common.tasks import Data
from common.tasks.digits import Digits

MARKER = "patient-4711"
MEET_SECONDS = 20.0


class Seeded(SecureGenerator):
    """The mistake that the real one rules out: every process draws the same noise."""

    def __init__(self) -> None:
        super().__init__()
        self._seeded = torch.Generator().manual_seed(1)

    def normal(self, shape, std, *, device=None, dtype=torch.float32):  # type: ignore[no-untyped-def]
        return torch.empty(tuple(shape), dtype=dtype).normal_(0.0, std, generator=self._seeded).to(device)


class Obedient(Digits):
    def order(self) -> str:
        path = self.root / "order"
        return path.read_text() if path.exists() else ""

    def model(self) -> nn.Module:
        """Called for each job, before the charge."""
        vars(app)["SecureGenerator"] = SecureGenerator
        if self.order() == "die before the charge":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().model()

    def train_data(self, partition: int, partitions: int) -> Data:
        """Called after the charge, where the worker served another partition before."""
        order = self.order()
        with (self.root / "readers").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if "die" in order:
            os.kill(os.getpid(), signal.SIGKILL)
        if "unreadable" in order:
            raise OSError(f"no such record: {MARKER}")
        if "meet" in order:
            self._meet()
        if "hold" in order:
            time.sleep(0.3)
        data = super().train_data(partition, partitions)
        if "crash" in order:
            return Data(inputs=data.inputs, targets=torch.full_like(data.targets, 4711))  # no such class
        if "seeded" in order:
            vars(app)["SecureGenerator"] = Seeded
        if "blank" in order:  # blank digits have no gradient: what is released is noise alone
            return Data(inputs=torch.zeros_like(data.inputs), targets=data.targets)
        return data

    def _meet(self) -> None:
        """Waits for a second process, so that two workers serve at the same time."""
        deadline = time.monotonic() + MEET_SECONDS
        while time.monotonic() < deadline:
            if len(set((self.root / "readers").read_text().split())) > 1:
                return
            time.sleep(0.01)
