"""Refuses a model whose per-record gradients would not bound what one record can do, and names the layer.

Clipping bounds one record's influence only if each record's gradient depends on that record alone and is
whole. The model is not believed but probed with made-up records: what it computes for a record must not
change with the other records, and Opacus' gradients must be those of plain autograd.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from client.layer_trace import (
    ModelRefused,
    WithoutDropout,
    close,
    describe,
    first_difference,
    first_line,
    owner,
    trace,
)

__all__ = ["RECORDS", "ModelRefused", "check_model", "resampled"]

RECORDS = 5  # a prime, so that another dimension is rarely taken for the batch

Loss = Callable[[Tensor, Tensor], Tensor]


def check_model(model: nn.Module, loss: Loss, example_inputs: Tensor, example_targets: Tensor) -> None:
    """Returns if Opacus' `GradSampleModule(strict=False)` computes the gradient of each record of `model`.

    `loss` maps outputs [k, ...] and targets [k, ...] to a value per record, [k]. `example_inputs` [k, ...]
    and `example_targets` [k, ...], k >= 2, must be public (test data or made up): they show which shapes
    and values occur. Works on a copy on the CPU; the model and the random generators stay as they are.

    Accepted are also frozen parameters, constant buffers, dropout, tied parameters and layers called
    several times, if each use is a call of a layer on a tensor with the batch first. Raises ModelRefused
    for what is not accepted, ValueError for examples that show nothing.
    """
    if not len(example_inputs) == len(example_targets) >= 2:
        raise ValueError(f"expected 2 examples or more, found {len(example_inputs)}, {len(example_targets)}")
    if bool((example_inputs == example_inputs[:1]).all()):
        raise ValueError("expected example_inputs to differ, found copies of one record")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model = copy.deepcopy(model).cpu().train()
        inputs, others = (resampled(example_inputs.cpu(), seed) for seed in (0, 1))
        targets = example_targets.cpu()[torch.arange(RECORDS) % len(example_targets)]
        _check_layers(model)
        _check_forward(model, loss, inputs, targets)
        _check_other_records(model, loss, inputs, targets, others)
        with WithoutDropout():
            _check_batch_size(model, loss, inputs, targets)
            _check_gradients(model, loss, inputs, targets)


def _check_layers(model: nn.Module) -> None:
    """Something to train, and no layer that Opacus knows it cannot."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelRefused(f"{describe(model, '')} has no trainable parameter: set requires_grad on some")
    for name, module in model.named_modules():
        validate = ModuleValidator.VALIDATORS.get(type(module))
        trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if validate and trainable and validate(module):
            fixed = repr(ModuleValidator.FIXERS[type(module)](module)).splitlines()[0].removesuffix("(")
            raise ModelRefused(f"{describe(model, name)} cannot be trained per record: replace it by {fixed}")


def _check_forward(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
    """Buffers are constant, outputs and loss have one row per record, and every parameter takes part."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = trace(model, inputs)[0]
    for name, buffer in model.named_buffers():
        if name not in before or not close(before[name], buffer, 0, 0):
            raise ModelRefused(
                f"buffer {name} of {owner(model, name)} changes in training, and buffers get no noise: make it constant"
            )
    losses = loss(outputs, targets)
    if losses.shape != (RECORDS,):
        raise ModelRefused(
            f"the loss must be one value per record, shape [{RECORDS}], found {list(losses.shape)}: use "
            "reduction='none' and average over all but the first dimension"
        )
    if not losses.isfinite().all():
        raise ModelRefused(f"the loss is not finite on made-up records: {losses.tolist()}")
    for name, gradient in _gradients(model, losses.sum()).items():
        if gradient is None:
            raise ModelRefused(
                f"parameter {name} of {owner(model, name)} takes no part in the loss: remove or freeze it"
            )


def _check_other_records(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, others: Tensor) -> None:
    """A record's output and loss stay the same when all other records are replaced."""
    outputs, calls = trace(model, inputs)
    for i in range(RECORDS):
        changed_inputs, changed_targets = others.clone(), targets.roll(1, 0)
        changed_inputs[i], changed_targets[i] = inputs[i], targets[i]
        changed, changed_calls = trace(model, changed_inputs)
        if not close(outputs[i], changed[i]):
            culprit = first_difference(calls, i, changed_calls, i) or describe(model, "")
            raise ModelRefused(f"{culprit} mixes records: compute a record's output from that record alone")
        if not close(loss(outputs, targets)[i], loss(changed, changed_targets)[i]):
            raise ModelRefused("the loss mixes records: compute a record's value from that record alone")


def _check_batch_size(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
    """A record's output and loss are the same in a batch of one: what is absent has no influence either."""
    outputs, calls = trace(model, inputs)
    for i in range(RECORDS):
        alone, alone_calls = trace(model, inputs[i : i + 1])
        if not close(outputs[i], alone[0]):
            culprit = first_difference(calls, i, alone_calls, 0) or describe(model, "")
            raise ModelRefused(
                f"{culprit} depends on the number of records in the batch, or on random numbers other than "
                "dropout's: compute a record's output from that record alone"
            )
        if not close(loss(outputs, targets)[i : i + 1], loss(alone, targets[i : i + 1])):
            raise ModelRefused("the loss depends on the number of records in the batch: do not divide by it")


def _check_gradients(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
    """Opacus' gradients of a batch are autograd's gradients of one record at a time."""
    batch = _opacus_gradients(model, loss, inputs, targets)
    for i in range(RECORDS):
        alone = _gradients(model, loss(trace(model, inputs[i : i + 1])[0], targets[i : i + 1]).sum())
        negligible = 1e-6 * max((float(g.abs().max()) for g in alone.values() if g is not None), default=0.0)
        for name, gradient in alone.items():
            found = batch[name]
            expected = torch.zeros_like(model.get_parameter(name)) if gradient is None else gradient
            whole = isinstance(found, Tensor) and len(found) == RECORDS
            if not (whole and close(expected, found[i], 1e-3, negligible)):
                raise ModelRefused(
                    f"parameter {name} of {owner(model, name)} gets a wrong per-record gradient by Opacus: "
                    "use it only by calling its layer, with the batch dimension first, and use every output"
                )


def _opacus_gradients(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """Per-record gradients [k, *shape] by parameter; None or a list if Opacus miscounts the calls."""
    model = copy.deepcopy(model)
    entered: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # as Opacus means it to
            losses = loss(GradSampleModule(model, loss_reduction="sum", strict=False)(inputs), targets)
            entered.clear()
            losses.sum().backward()
    except Exception as error:
        # The last layer entered, in the forward pass or as Opacus repeats it; else one that it may repeat.
        names = entered[-1:] or [
            name
            for name, module in model.named_modules()
            if type(module) not in GradSampleModule.GRAD_SAMPLERS
            and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        ]
        where = ", ".join(describe(model, name) for name in names) or "the model"
        raise ModelRefused(
            f"{where} is beyond Opacus: use out-of-place operations, and give parameters a layer of their own "
            f"without dropout or buffers ({first_line(error)})"
        ) from error
    return {name: getattr(p, "grad_sample", None) for name, p in model.named_parameters() if p.requires_grad}


def _gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor | None]:
    """Autograd's gradient of a scalar by trainable parameter; None for one that takes no part."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not value.requires_grad:
        return dict.fromkeys(parameters)
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def resampled(examples: Tensor, seed: int) -> Tensor:
    """Made-up records [RECORDS, ...]: each entry is a random example's, so it is valid in its place."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(examples), (RECORDS, *examples.shape[1:]), generator=generator)
    return examples.gather(0, chosen)
