"""Random changes of images [k, channels, height, width], of any type: each by its own numbers in [0, 1).

A few copies of the batch as a whole, with no work for each image nor for each row of it.
"""

from functools import cache

import torch
from torch import Tensor


def flip_and_crop(images: Tensor, border: int, draws: Tensor) -> Tensor:
    """Half of them mirrored, left to right; then each cut out of itself within a border of zeros.

    `draws`, [k, 3]: whether it is mirrored, and which of the 2 border + 1 places it takes, down and to the right.
    """
    count, _, height, width = images.shape
    size, across = images[0].numel(), 2 * border + 1
    mirrored = (draws[:, 0] < 0.5).nonzero().squeeze(1)
    images_of = torch.arange(count, device=images.device)
    images_of[mirrored] = torch.arange(count, count + len(mirrored), device=images.device)
    down, right = (draws[:, 1:] * across).long().clamp_(max=across - 1).unbind(1)

    # An image moved by rows and columns starts elsewhere in memory, and that is all. What comes in over its edges, of
    # the row, the channel or the image beside it, is then taken away: bit by bit, as zero times NaN is not zero.
    edge = images.new_empty(border * (width + 1))
    flipped = images.index_select(0, mirrored).flip(3)
    memory = torch.cat([edge, images.flatten(), flipped.flatten(), edge])
    starts = memory.as_strided((len(memory) - size + 1, size), (1, 1))
    moved = starts.index_select(0, images_of * size + down * width + right).view(images.shape)
    inside = _inside(height, width, border, images.element_size(), images.device).index_select(0, down * across + right)
    moved.view(torch.uint8).bitwise_and_(inside)
    return moved


@cache
def _inside(height: int, width: int, border: int, pixel: int, device: torch.device) -> Tensor:
    """All bits where an image lies that was moved to a place, else none: uint8 [places, 1, height, bytes of a row]."""
    move = torch.arange(-border, border + 1, device=device).unsqueeze(1)
    down, right = (move + torch.arange(size, device=device) for size in (height, width))
    tall, wide = (down >= 0) & (down < height), (right >= 0) & (right < width)
    both = (tall[:, None, :, None] & wide[None, :, None, :]).view(-1, 1, height, width)
    return both.byte().neg_().repeat_interleave(pixel, dim=3)
