"""The models that steps are measured on, each with a batch of made-up records of its task's shape."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

CLASSES = 10
WIDTH, PLACES, WORDS = 64, 32, 1000  # of the transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and a batch size."""

    name: str
    model: Callable[[], nn.Module]
    batch: int
    runs: int  # measurements of each variant
    words: bool = False  # records are words and not pictures
    left_out: tuple[str, ...] = ()  # variants that take minutes on a CPU

    def inputs(self, records: int) -> Tensor:
        if self.words:
            return torch.randint(WORDS, (records, PLACES))
        return torch.randn(records, 3, 32, 32)


def ancestor_cnn() -> nn.Module:
    """The ancestor's network for CIFAR-10: 5x5 convolutions of 6 and 16 channels, then 120, 84, 10."""

    def stage(channels: int, more: int, groups: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, more, 5), nn.Tanh(), nn.AvgPool2d(2), nn.GroupNorm(groups, more)]

    return nn.Sequential(
        *stage(3, 6, 2), *stage(6, 16, 4), nn.Flatten(),
        nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, CLASSES),
    )  # fmt: skip


class Block(BasicBlock):
    """torchvision's, which adds in place, where hooks on the layers forbid it."""

    def forward(self, x: Tensor) -> Tensor:
        same = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + same)


def resnet18() -> nn.Module:
    """torchvision's ResNet18 with 32 groups where it has batch norm, which mixes records."""
    model = ResNet(Block, [2, 2, 2, 2], num_classes=CLASSES, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


class Attention(nn.Module):
    """Self-attention built from Linear layers, 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(2, (4, -1)).transpose(1, 2) for f in (self.ask, self.key, self.value)]
        return self.out(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """One layer of a transformer encoder, norm first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.narrow(nn.functional.gelu(self.wide(self.second(x))))


class Transformer(nn.Module):
    """A classifier of short texts: words and their places, two encoder layers, the mean over the places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.layers = nn.Sequential(Encoder(), Encoder())
        self.out = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("order", torch.arange(PLACES))

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(self.order.repeat(len(x), 1))  # the batch first, as for every other layer
        return self.out(self.layers(self.words(x) + places).mean(1))


CASES = (
    Case(name="CNN, batch 256", model=ancestor_cnn, batch=256, runs=9),
    Case(name="CNN, batch 64", model=ancestor_cnn, batch=64, runs=9),
    Case(name="ResNet18, batch 64", model=resnet18, batch=64, runs=5, left_out=("compiled",)),
    Case(name="transformer, batch 64", model=Transformer, batch=64, runs=7, words=True),
)
