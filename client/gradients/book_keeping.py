"""Clipped sums in one backward pass: Bu et al. 2023, arXiv:2210.00038.

The pass goes to the layers' outputs only; from a layer's input and the gradient of its output follow its records'
norms, and with the factors of all layers known, the sum of the scaled gradients. No gradient of a large layer is ever
made per record. A record is clipped by an upper bound of its norm that includes what rounding may add, so that the
bound of the sum holds for adversarial parameters too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from client.gradients.clipped import Loss, Unsupported, factors, trainable
from client.gradients.layers import PARTS


class BookKeeping:
    """`ClippedSums` for models whose trainable parameters all lie in layers of `PARTS`, each called once a pass."""

    def __init__(self, model: nn.Module, loss: Loss, max_grad_norm: float) -> None:
        self._model, self._loss, self._bound = model, loss, max_grad_norm
        self._parameters = trainable(model)
        self._layers = _layers(model)
        self._calls: dict[nn.Module, _Call] = {}
        self._hooks = [layer.register_forward_hook(self._keep) for layer in self._layers]

    def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        if not len(inputs):
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        try:
            self._pass(inputs, targets)
            return self._sums(len(inputs))
        finally:
            self._calls.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _pass(self, inputs: Tensor, targets: Tensor) -> None:
        """Fills `_calls` with each layer's input and the gradient of its output."""
        self._start = torch.zeros((), device=inputs.device, requires_grad=True)
        # Frozen for the pass, so that no gradient of a parameter is computed, which is half of a backward's work.
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                losses = self._loss(self._model(inputs), targets)
                torch.autograd.grad(losses.sum(), self._start, allow_unused=True)
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    def _keep(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if layer in self._calls:
            raise Unsupported(f"{self._layers[layer]} is called twice: its gradients cannot be told apart")
        (inputs,) = arguments
        call = self._calls[layer] = _Call(inputs.detach())
        return _Tap.apply(output, self._start, call)

    def _sums(self, batch: int) -> list[Tensor]:
        parts = {}
        for layer, call in self._calls.items():
            if call.gradients is None:
                continue  # its output took no part in the loss
            if len(call.inputs) != batch or len(call.gradients) != batch:
                raise Unsupported(f"{self._layers[layer]} does not have the batch first")
            if call.inputs._version != call.version:
                raise Unsupported(f"{self._layers[layer]}: its input was changed in place after it was read")
            parts[layer] = PARTS[type(layer)](layer, call.inputs, call.gradients)
            call.gradients = None
        sums: dict[nn.Parameter, Tensor] = {}
        if parts:
            norms = [part.norms() for part in parts.values()]
            squared = torch.stack([norm.squared for norm in norms]).sum(0)
            slack = torch.stack([torch.as_tensor(norm.slack).to(squared).expand(batch) for norm in norms]).norm(dim=0)
            scale = factors(squared.sqrt() + slack, self._bound)
            for layer, part in parts.items():
                own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
                sums.update(zip(own, part.sums(scale), strict=True))
        return [sums[p] if p in sums else torch.zeros_like(p) for p in self._parameters]


class _Call:
    """What one layer saw in one pass."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.version = inputs._version  # shared with the tensor that the model has
        self.gradients: Tensor | None = None


class _Tap(torch.autograd.Function):
    """The identity, which notes the gradient that comes back, and makes one come back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _start: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.mark_dirty(output)  # the same tensor goes on: a view could not be changed in place by a later layer
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        ctx.call.gradients = gradient.detach()
        return gradient if ctx.needs_input_grad[0] else None, None, None


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    """The layers with trainable parameters of their own, by what to call them. Raises Unsupported."""
    found: dict[nn.Module, str] = {}
    owners: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        described = f"{type(module).__name__} {name!r}" if name else f"the model itself ({type(module).__name__})"
        if type(module) not in PARTS:
            raise Unsupported(f"{described}: no rule for a layer of this type")
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise Unsupported(f"{described}: no rule for max_norm or scale_grad_by_freq")
        if getattr(module, "track_running_stats", False):
            raise Unsupported(f"{described}: no rule for running statistics")
        for parameter in own:
            if parameter in owners:
                raise Unsupported(f"{described} shares a parameter with {owners[parameter]}")
            owners[parameter] = described
        found[module] = described
    return found
