"""Fashion-MNIST (arXiv:1708.07747) through torchvision's loader, from a local copy: nothing is downloaded."""

import gzip
import os
import shutil
from pathlib import Path

from torch import nn
from torchvision.datasets import FashionMNIST

from common.tasks.classification import Classification
from common.tasks.protocol import Data, TaskError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class FashionMnist(Classification):
    """60 000 pictures of clothes to train on, 10 000 to test; 28x28 grey pixels."""

    records = 60_000

    def model(self) -> nn.Module:
        """Return the small CNN with tanh of Papernot et al. 2020, arXiv:2007.14191."""
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 8, stride=2, padding=2), nn.Tanh(), nn.MaxPool2d(2, 1)),  # [n, 16, 12, 12]
            *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1)),  # [n, 32, 4, 4]
            *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
        )

    def load(self, *, train: bool) -> Data:
        raw = self.root / "FashionMNIST" / "raw"
        missing = [name for name in _FILES if not (raw / name).is_file()]
        try:
            for name in missing:
                _unpack(DEBIAN / f"{name}.gz", raw / name)
        except OSError as error:
            raise TaskError(
                f"task: 'fashion_mnist': {error}; put the unpacked {', '.join(missing)} into {raw}, "
                "or install Debian's package dataset-fashion-mnist"
            ) from error
        images = FashionMNIST(self.root, train=train)
        return Data(inputs=images.data.unsqueeze(1), targets=images.targets.long())


def _unpack(packed: Path, target: Path) -> None:
    with gzip.open(packed) as source:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}")
        with part.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    part.replace(target)  # whole or not at all: other workers may be unpacking it as well
