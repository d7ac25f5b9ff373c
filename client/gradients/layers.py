"""One layer's part in the per-record gradients, from its input and the gradient of its output.

Each class answers two questions: the squared norms of the records' gradients, and, once the records' factors are
known, the sums of the scaled gradients. Nothing else of the layer is needed, so that one backward pass through the
model serves all layers (Bu et al. 2023, arXiv:2210.00038, "book-keeping").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.gradients.columns import Columns, Convolution, Windows, Written, only

_ROUND = 2.0**-53  # unit roundoff of float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Norms:
    """Of the records' gradients in one layer, float64 [batch] each."""

    squared: Tensor
    slack: Tensor | float = 0.0  # bounds what the rounding of the sums may add to a record's gradient, per unit factor


class Part(Protocol):
    """One layer in one pass."""

    def norms(self) -> Norms: ...
    def sums(self, scale: Tensor) -> list[Tensor]:
        """One sum per trainable parameter of the layer, in the order of its `parameters(recurse=False)`."""
        ...


class Product:
    """A layer that multiplies: Linear and the convolutions. Its output at place t is weight @ a[t] (+ bias).

    `columns` are the a[t]; `gradients` [batch, groups, p, places]. With one place, or few for the size of the weight,
    the norm comes from inner products ("ghost norm", Goodfellow 2015, Li et al. 2021) in float64, since their terms may
    cancel; else from the gradients themselves, which are then what is summed.
    """

    def __init__(self, layer: nn.Module, columns: Columns, gradients: Tensor) -> None:
        own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
        self._weight, self._bias = own.get("weight"), own.get("bias")
        self._columns, self._gradients = columns, gradients
        _, _, d, places = columns.shape
        p = gradients.shape[2]
        self._whole: Tensor | None = None
        if self._weight is not None and places * d * p <= 2 * places**2 * (d + p) and places > 1:
            self._whole = columns.products(gradients)  # [batch, groups, p, d]

    def norms(self) -> Norms:
        g = self._gradients.double() if self._whole is None else self._gradients
        squared = torch.zeros(len(g), dtype=torch.float64, device=g.device)
        slack: Tensor | float = 0.0
        if self._bias is not None:
            self._summed = self._gradients.sum(-1)  # [batch, groups, p]
            squared += _squared(self._summed)
        if self._whole is not None:
            squared += _squared(self._whole)
        elif self._weight is not None:
            batch, _, d, places = self._columns.shape
            between = self._columns.inner_products()  # [batch, groups, places, places]
            lengths = (between.diagonal(dim1=2, dim2=3) * g.pow(2).sum(2)).sqrt()  # [batch, groups, places]
            if places == 1:
                squared += lengths.pow(2).sum((1, 2))
            else:
                inner = (between * (g.mT @ g)).sum((1, 2, 3)).clamp(min=0)
                total = lengths.sum(2)  # [batch, groups]: an upper bound of the norm
                squared += inner + _rounding(places**2 + d + g.shape[2], _ROUND) * total.pow(2).sum(1)
                # The sums below add batch * places terms in the layer's own precision: their rounding is relative to
                # the terms and not to what is left of them after they cancel.
                unit = torch.finfo(self._gradients.dtype).eps / 2
                slack = _rounding(batch * places, unit) * total.pow(2).sum(1).sqrt()
        return Norms(squared=squared, slack=slack)

    def sums(self, scale: Tensor) -> list[Tensor]:
        found = []
        if self._weight is not None:
            if self._whole is not None:
                total = _weighted(scale, self._whole)
            else:
                total = self._columns.summed(_scaled(self._gradients, scale), scale != 0)
            found.append(total.reshape(self._weight.shape))
        if self._bias is not None:
            found.append(_weighted(scale, self._summed).reshape(self._bias.shape))
        return found


class Whole:
    """A layer whose gradients per record are small, and are made: one [batch, *shape] per trainable parameter."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients

    def norms(self) -> Norms:
        return Norms(squared=torch.stack([_squared(gradient) for gradient in self._gradients]).sum(0))

    def sums(self, scale: Tensor) -> list[Tensor]:
        return [_weighted(scale, gradient) for gradient in self._gradients]


class Lookup:
    """An embedding: `indices` [batch, places] chose the rows, `gradients` [batch, places, width] are theirs."""

    def __init__(self, layer: nn.Embedding, indices: Tensor, gradients: Tensor) -> None:
        self._layer = layer
        self._indices = indices
        if layer.padding_idx is not None:
            gradients = gradients.masked_fill((indices == layer.padding_idx)[..., None], 0.0)
        self._gradients = gradients

    def norms(self) -> Norms:
        g = self._gradients.double()
        same = self._indices[:, :, None] == self._indices[:, None, :]  # [batch, places, places]
        places, width = g.shape[1:]
        total = g.norm(dim=2).sum(1)
        inner = ((g @ g.mT) * same).sum((1, 2)).clamp(min=0)
        unit = torch.finfo(self._gradients.dtype).eps / 2
        return Norms(
            squared=inner + _rounding(places**2 + width, _ROUND) * total.pow(2),
            slack=_rounding(len(g) * places, unit) * total,
        )

    def sums(self, scale: Tensor) -> list[Tensor]:
        total = torch.zeros_like(self._layer.weight)
        return [total.index_add_(0, self._indices.flatten(), _scaled(self._gradients, scale).flatten(0, 1))]


def _linear(layer: nn.Linear, inputs: Tensor, gradients: Tensor) -> Part:
    inputs, gradients = (x.reshape(len(x), 1, -1, x.shape[-1]).mT for x in (inputs, gradients))
    return Product(layer, Written(inputs), gradients)


def _convolution(layer: Convolution, inputs: Tensor, gradients: Tensor) -> Part:
    columns = Windows(layer, inputs, gradients.shape[2:])
    return Product(layer, columns, gradients.reshape(len(inputs), layer.groups, -1, columns.shape[3]))


def _norm(layer: nn.Module, inputs: Tensor, gradients: Tensor) -> Part:
    """GroupNorm and InstanceNorm: scale and shift of each channel."""
    if isinstance(layer, nn.GroupNorm):
        normal = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    else:
        normal = F.instance_norm(inputs, eps=layer.eps)  # type: ignore[arg-type]
    each = {"weight": (normal * gradients).flatten(2).sum(2) if inputs.dim() > 2 else normal * gradients}
    each["bias"] = gradients.flatten(2).sum(2) if inputs.dim() > 2 else gradients
    return Whole([each[name] for name, p in layer.named_parameters(recurse=False) if p.requires_grad])


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, gradients: Tensor) -> Part:
    normal = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    between = tuple(range(1, inputs.dim() - len(layer.normalized_shape)))
    each = {"weight": normal * gradients, "bias": gradients}
    kept = [each[name] for name, p in layer.named_parameters(recurse=False) if p.requires_grad]
    return Whole([x.sum(between) if between else x for x in kept])


def _embedding(layer: nn.Embedding, indices: Tensor, gradients: Tensor) -> Part:
    return Lookup(layer, indices.reshape(len(indices), -1), gradients.reshape(len(indices), -1, gradients.shape[-1]))


# By exact type: a subclass may compute something else.
PARTS: dict[type, Callable[..., Part]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.GroupNorm: _norm,
    nn.InstanceNorm1d: _norm,
    nn.InstanceNorm2d: _norm,
    nn.InstanceNorm3d: _norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


def _squared(gradients: Tensor) -> Tensor:
    """Squared norms of [batch, ...], float64 [batch]."""
    return gradients.flatten(1).norm(dim=1).double().pow(2)


def _weighted(scale: Tensor, gradients: Tensor) -> Tensor:
    """The sum over the batch of `scale` [batch] times `gradients` [batch, ...]; nothing of a record with factor 0."""
    return torch.einsum("b,b...->...", scale.to(gradients.dtype), only(gradients, scale != 0))


def _scaled(gradients: Tensor, scale: Tensor) -> Tensor:
    """Each record's gradient times its factor: exactly zero where that is 0, be the gradient NaN."""
    shape = (-1, *[1] * (gradients.dim() - 1))
    return only(gradients * scale.to(gradients.dtype).view(shape), scale != 0)


def _rounding(terms: int, unit: float) -> float:
    """Higham 2002, lemma 3.1: the relative error of a sum of products of so many terms, in any order."""
    return terms * unit / (1 - terms * unit)
