"""The digits of an owner who notes each time that somebody reads them; a file `die` makes that deadly."""

import os
import signal

from common.tasks.digits import Digits
from common.tasks.protocol import Data, TaskError


class Watched(Digits):
    def train_data(self, partition: int, partitions: int) -> Data:
        with (self.root / "records-read").open("a") as file:
            file.write(f"{partition}\n")
        if (self.root / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_data(partition, partitions)


class Lost(Digits):
    def test_data(self) -> Data:
        raise TaskError(f"nothing at {self.root / 'test'}")
