"""Refuses a task whose way from a record to the model's input would let one record into another's gradient.

As client.model_check does with the model: each part is probed with made-up records, and what it makes of a record must
not change with the other records, with their number, or with random numbers other than the record's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from client.layer_trace import ModelRefused, close, first_line
from client.model_check import RECORDS, resampled
from common.tasks.inputs import Inputs

_TIMES = 8  # with other random numbers each: what it does to some batches only is seen too


def check_inputs(inputs: Inputs, examples: Tensor) -> None:
    """Returns if `inputs` makes each record's input of that record and its own random numbers.

    `examples` [k, ...], k >= 2, are public raw records. The random generators stay as they are.

    Raises:
        ModelRefused: it does not. One line that names `augment` or `prepare`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        for time in range(_TIMES):
            records, others = (resampled(examples.cpu(), 2 * time + i) for i in (0, 1))
            if inputs.augment is not None:
                own, foreign = (torch.rand(RECORDS, inputs.draws) for _ in range(2))
                records, others = _check("augment", inputs.augment, [records, own], [others, foreign])
            if inputs.prepare is not None:
                _check("prepare", inputs.prepare, [records], [others])


def _check(
    name: str, function: Callable[..., Tensor], records: list[Tensor], others: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """What `function` makes of the one and the other, a row for each record of `records` alone."""
    found = _result(name, function, records)
    for i in range(RECORDS):
        changed = [part.clone() for part in others]
        for part, own in zip(changed, records, strict=True):
            part[i] = own[i]
        if not _same(found[i], _result(name, function, changed)[i]):
            raise ModelRefused(f"the task's {name} mixes records: make of a record what that record alone tells")
        if not _same(found[i], _result(name, function, [part[i : i + 1] for part in records])[0]):
            raise ModelRefused(
                f"the task's {name} depends on the number of records in the batch, or on random numbers other than "
                "its `draws`: make of a record what that record and its draws alone tell"
            )
    return found, _result(name, function, others)


def _result(name: str, function: Callable[..., Tensor], arguments: list[Tensor]) -> Tensor:
    count = len(arguments[0])
    try:
        result = function(*(part.clone() for part in arguments))
    except Exception as error:
        raise ModelRefused(f"the task's {name} fails on {count} records at a time: {first_line(error)}") from error
    if not isinstance(result, Tensor) or result.shape[:1] != (count,):
        found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ModelRefused(f"the task's {name} must return a tensor, a row for each of {count} records, found {found}")
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    return close(a, b) if a.is_floating_point() else torch.equal(a, b)
