"""Random changes of images [k, channels, height, width], of any type: each by its own number in [0, 1), from [k].

Each is a few copies of the whole batch, with no work per image nor per pixel.
"""

import torch
from torch import Tensor
from torch.nn import functional


def flip(images: Tensor, draws: Tensor) -> Tensor:
    """Half of them mirrored, left to right."""
    chosen = torch.arange(len(images), device=images.device) + len(images) * (draws < 0.5)
    return torch.cat([images, images.flip(3)]).index_select(0, chosen)


def crop(images: Tensor, border: int, down: Tensor, right: Tensor) -> Tensor:
    """Each cut out of itself within a border of zeros, at any of (2 border + 1)**2 places."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, (border,) * 4)
    tall, wide = padded.shape[2:]
    size = channels * tall * wide
    # All windows of this height and width that the memory holds, one for each number that it starts at; none is copied.
    last = count * size - ((channels - 1) * tall + height - 1) * wide - width
    windows = padded.as_strided((last + 1, channels, height, width), (1, tall * wide, wide, 1))
    rows, columns = (_places(draws, 2 * border + 1) for draws in (down, right))
    return windows.index_select(0, torch.arange(count, device=images.device) * size + rows * wide + columns)


def _places(draws: Tensor, count: int) -> Tensor:
    """0 to `count` - 1, each as likely, [k] int64."""
    return (draws * count).long().clamp_(max=count - 1)
