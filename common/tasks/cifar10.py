"""CIFAR-10 through torchvision's loader, from a local copy: nothing is downloaded."""

import torch
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from common.tasks.augment import flip_and_crop
from common.tasks.classification import Classification
from common.tasks.protocol import Data, TaskError


class Cifar10(Classification):
    """50 000 photographs to train on, 10 000 to test; 32x32 colour pixels."""

    records = 50_000
    draws = 3  # per record: flip, crop down, crop right

    def model(self) -> nn.Module:
        """Return LeNet's shape with tanh, average pooling and group norm, which does not mix records."""
        return nn.Sequential(
            *(nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.GroupNorm(2, 6)),  # [n, 6, 14, 14]
            *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.GroupNorm(4, 16)),  # [n, 16, 5, 5]
            *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
        )

    def augment(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """Flip and shift each by up to 4 pixels: He et al. 2016, arXiv:1512.03385."""
        return flip_and_crop(inputs, 4, draws)

    def load(self, *, train: bool) -> Data:
        try:
            images = CIFAR10(self.root, train=train)  # checks the files' digests before it unpickles them
        except RuntimeError as error:
            folder = self.root / CIFAR10.base_folder
            raise TaskError(
                "task: 'cifar10': files are missing or damaged; put data_batch_1 to data_batch_5, "
                f"test_batch and batches.meta of CIFAR-10's python version into {folder}"
            ) from error
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()  # NHWC to NCHW
        return Data(inputs=pixels, targets=torch.tensor(images.targets))
