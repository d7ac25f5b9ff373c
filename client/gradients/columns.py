"""What a multiplying layer multiplied: for each record and group the columns a[t], [d, places], of its inputs.

A convolution's columns overlap, and written out they take many times the memory of its input. So they are written out
a few records at a time, which stays in the cache, or not at all.
"""

import itertools
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CACHE_BYTES = 2**20  # of columns written out at a time
_WRITING = 16  # the cost of writing a number out, in multiplications


class Columns(Protocol):
    """`shape` is that of all columns written out: batch, groups, d, places."""

    shape: tuple[int, int, int, int]

    def products(self, gradients: Tensor) -> Tensor:
        """Each record's gradient of the weight, [batch, groups, p, d], for `gradients` [batch, groups, p, places]."""
        ...

    def inner_products(self) -> Tensor:
        """a[s] . a[t] of each two columns of a record, float64 [batch, groups, places, places]."""
        ...

    def summed(self, gradients: Tensor, used: Tensor) -> Tensor:
        """The sum of the `products` of the records that are `used`, bool [batch], in the shape of the weight or alike.

        Nothing is taken of the other records, be their inputs NaN; their gradients are zero.
        """
        ...


class Written:
    """`Columns` that lie in memory as they are, [batch, groups, d, places]: those of Linear."""

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns
        batch, groups, d, places = columns.shape
        self.shape = batch, groups, d, places

    def products(self, gradients: Tensor) -> Tensor:
        return gradients @ self._columns.mT

    def inner_products(self) -> Tensor:
        columns = self._columns.double()
        if columns.shape[-1] == 1:
            return columns.pow(2).sum(2, keepdim=True)
        return columns.mT @ columns

    def summed(self, gradients: Tensor, used: Tensor) -> Tensor:
        return torch.einsum("bgpt,bgdt->gpd", gradients, only(self._columns, used))


class Windows:
    """`Columns` of a convolution: what its kernel saw of `inputs` [batch, channels, ...] at each of `places`."""

    def __init__(self, layer: Convolution, inputs: Tensor, places: torch.Size) -> None:
        self._layer, self._places = layer, places
        self._padded = _pad(layer, inputs).contiguous()
        batch, channels = inputs.shape[:2]
        kernel = math.prod(layer.kernel_size)
        self.shape = batch, layer.groups, channels // layer.groups * kernel, math.prod(places)

    def products(self, gradients: Tensor) -> Tensor:
        if self._padded.device.type != "cpu":
            return gradients @ self._written().mT
        view = self._view()
        batch, groups, d, places = self.shape
        found = gradients.new_empty(batch, groups, gradients.shape[2], d)
        most = min(batch, max(1, _CACHE_BYTES // (groups * d * places * view.element_size())))
        block = view.new_empty(most, groups, d, places)
        for start in range(0, batch, most):
            part = view[start : start + most]
            columns, end = block[: len(part)], start + len(part)
            columns.view(part.shape).copy_(part)
            into = found[start:end].flatten(0, 1)
            torch.bmm(gradients[start:end].flatten(0, 1), columns.flatten(0, 1).mT, out=into)
        return found

    def inner_products(self) -> Tensor:
        batch, groups, d, places = self.shape
        channels, points = self._padded.shape[1] // groups, math.prod(self._padded.shape[2:])
        if places * d * (places + _WRITING) <= points * channels * (points + _WRITING):
            return Written(self._written()).inner_products()
        # Points of the input are multiplied once; a window's inner product is the sum over its points.
        x = self._padded.reshape(batch, groups, channels, points).double()
        between = x.mT @ x
        steps = _steps(self._padded.shape[2:])
        dilated = [d * (step * (points + 1)) for d, step in zip(self._layer.dilation, steps, strict=True)]
        strided = [s * step for s, step in zip(self._layer.stride, steps, strict=True)]
        view = between.as_strided(
            (batch, groups, *self._layer.kernel_size, *self._places, *self._places),
            (*between.stride()[:2], *dilated, *(points * step for step in strided), *strided),
        )
        kernel = tuple(range(2, 2 + len(dilated)))
        return view.sum(kernel).reshape(batch, groups, places, places)

    def summed(self, gradients: Tensor, used: Tensor) -> Tensor:
        batch, groups, _, places = self.shape
        layer = self._layer
        rows = gradients.permute(1, 2, 0, 3).flatten(2)  # [groups, p, batch * places]
        last = only(self._padded, used).movedim(1, -1).contiguous()
        found = rows.new_empty(*layer.kernel_size, *rows.shape[:2], last.shape[-1] // groups)
        # One point of the kernel at a time: what it saw is a part of the input, as large as the output.
        for point in itertools.product(*map(range, layer.kernel_size)):
            seen = last[(slice(None), *map(_every, point, layer.dilation, layer.stride, self._places))]
            torch.bmm(rows, seen.reshape(batch * places, groups, -1).transpose(0, 1), out=found[point])
        kernel = len(layer.kernel_size)
        return found.permute(*range(kernel, kernel + 3), *range(kernel))

    def _view(self) -> Tensor:
        """The columns as they lie in the input, [batch, channels, *kernel, *places]: many times faster than im2col."""
        batch, channels, *steps = self._padded.stride()
        dilated = [d * step for d, step in zip(self._layer.dilation, steps, strict=True)]
        strided = [s * step for s, step in zip(self._layer.stride, steps, strict=True)]
        size = (*self._padded.shape[:2], *self._layer.kernel_size, *self._places)
        return self._padded.as_strided(size, (batch, channels, *dilated, *strided))

    def _written(self) -> Tensor:
        return self._view().reshape(self.shape)


def only(values: Tensor, used: Tensor) -> Tensor:
    """`values` [batch, ...], exactly zero for the records that are not `used`."""
    return values if used.all() else values.masked_fill(~used.view(-1, *[1] * (values.dim() - 1)), 0.0)


def _pad(layer: Convolution, inputs: Tensor) -> Tensor:
    """With the layer's own padding: its amounts also say what "same" means, its mode what is put there."""
    amounts = layer._reversed_padding_repeated_twice
    if not any(amounts):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, amounts, mode=mode)


def _every(point: int, dilation: int, stride: int, places: int) -> slice:
    """Along one axis, what a point of the kernel saw at each place."""
    first = point * dilation
    return slice(first, first + (places - 1) * stride + 1, stride)


def _steps(size: torch.Size) -> list[int]:
    """Between neighbours along each axis, where points of `size` are counted in order."""
    return [math.prod(size[axis + 1 :]) for axis in range(len(size))]
