"""Per-record gradients by Opacus' hooks, as shipped: memory for every record's whole gradient."""

import warnings

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from client.gradients.clipped import Loss, Unsupported, factors, trainable


class Hooks:
    """`ClippedSums` by `GradSampleModule`."""

    def __init__(self, model: nn.Module, loss: Loss, max_grad_norm: float) -> None:
        self._model, self._loss, self._bound = model, loss, max_grad_norm
        self._parameters = trainable(model)
        # A model of one layer has no gradient with respect to its input, which torch remarks upon each time.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self._wrapped = self._wrap()

    def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        if not len(inputs):
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        try:
            self._loss(self._wrapped(inputs), targets).sum().backward()
            gradients = [parameter.grad_sample for parameter in self._parameters]  # type: ignore[attr-defined]
        except BaseException:
            # What an aborted pass left in the layers would be taken for the next one's.
            self.close()
            for module in self._model.modules():
                for left in ("activations", "max_batch_len"):
                    vars(module).pop(left, None)
            self._wrapped = self._wrap()
            raise
        finally:
            for parameter in self._parameters:
                parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
        norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in gradients]).norm(dim=0)  # [batch]
        scale = factors(norms, self._bound)
        if not scale.all():
            left_out = scale == 0
            gradients = [g.masked_fill(left_out.view(-1, *[1] * (g.dim() - 1)), 0.0) for g in gradients]
        return [torch.einsum("b,b...->...", scale.to(gradient.dtype), gradient) for gradient in gradients]

    def close(self) -> None:
        self._wrapped.to_standard_module()

    def _wrap(self) -> GradSampleModule:
        # What Opacus would be strict about, client.model_check has checked by its effect.
        try:
            return GradSampleModule(self._model, loss_reduction="sum", strict=False)
        except NotImplementedError as error:
            raise Unsupported(str(error)) from None
