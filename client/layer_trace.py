"""Finds the layer in which a record's result starts to differ between two batches.

Each layer's inputs and outputs are copied as they are at its call, so in-place operations cannot hide a
difference, and the random numbers are the same in every run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ModelRefused(ValueError):
    """The model cannot be trained with a per-record guarantee; one line names the layer and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of one layer: copies of the tensors that went in and came out."""

    layer: str  # as in `describe`
    records: int  # in the batch
    inputs: list[Tensor]
    outputs: list[Tensor]

    def rows(self, tensors: list[Tensor], i: int) -> list[Tensor | None]:
        """Record `i` of each tensor, None where the first dimension is not the batch."""
        return [t[i] if t.dim() and len(t) == self.records else None for t in tensors]


def trace(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Call]]:
    """The model's outputs [k, ...], and its calls in the order in which they end: leaves first.

    Raises ModelRefused if a layer fails, or if the outputs are no tensor with the batch first. Seeds
    torch's CPU generator: for use inside `torch.random.fork_rng`.
    """
    calls: list[Call] = []
    entered: list[tuple[str, list[Tensor]]] = []
    handles = []

    def leave(_module: nn.Module, _args: object, outputs: object) -> None:
        layer, before = entered.pop()
        calls.append(Call(layer=layer, records=len(inputs), inputs=before, outputs=list(_copies(outputs))))

    for name, module in model.named_modules():

        def enter(_module: nn.Module, args: object, kwargs: object, name: str = name) -> None:
            entered.append((describe(model, name), [*_copies(args), *_copies(kwargs)]))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which seeds every device
    try:
        outputs = model(inputs.clone())
    except Exception as error:
        layer = entered[-1][0] if entered else describe(model, "")
        raise ModelRefused(f"{layer} fails on {len(inputs)} records at a time: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != inputs.shape[:1]:
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelRefused(
            f"{describe(model, '')} must return a tensor with the batch dimension first, "
            f"[{len(inputs)}, ...], found {found}"
        )
    return outputs, calls


def first_difference(left: list[Call], i: int, right: list[Call], j: int) -> str | None:
    """The first layer whose outputs for record `i` and record `j` differ although its inputs do not."""
    for a, b in zip(left, right, strict=False):
        same_inputs = _same(a.rows(a.inputs, i), b.rows(b.inputs, j))
        if a.layer == b.layer and same_inputs and not _same(a.rows(a.outputs, i), b.rows(b.outputs, j)):
            return a.layer
    return None


def _same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all(a is None or b is None or close(a, b) for a, b in zip(left, right, strict=False))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4, negligible: float = 1e-7) -> bool:
    """Whether two tensors agree to a fraction of their largest entry."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    scale = float(torch.stack([a, b]).nan_to_num(0, 0, 0).abs().max())  # attention masks hold -inf
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale + negligible, equal_nan=True)


def _copies(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, as they are now."""
    if isinstance(value, Tensor):
        yield value.detach().clone()
    elif isinstance(value, dict):
        yield from _copies(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _copies(item)


class WithoutDropout(TorchFunctionMode):
    """Dropout passes its input on: only its mask may differ with the size of the batch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)


def describe(model: nn.Module, name: str) -> str:
    """A layer's dotted name and class, as in `features.1 (BatchNorm2d)`."""
    return f"{name or 'the model'} ({type(model.get_submodule(name)).__name__})"


def owner(model: nn.Module, tensor: str) -> str:
    """The layer that holds a parameter or buffer."""
    return describe(model, tensor.rpartition(".")[0])


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
