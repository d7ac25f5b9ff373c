"""Many workers on one GPU: each keeps to its share, and finds out before a charge whether a pass fits in it.

Whoever waits holds no memory of the GPU at all: a worker that is idle ends, and nothing else of a client touches one.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from client.policy import Refused
from common.config import Training
from common.messages import Reason

log = logging.getLogger(__name__)

Pass = Callable[[Tensor, Tensor], object]


def is_shared(device: torch.device) -> bool:
    """Whether others may want memory of the device that a worker computes on."""
    return device.type == "cuda"


def share(training: Training) -> float:
    """The part of the GPU's memory that one worker may use, (0, 1]."""
    return training.gpu_memory_fraction or 1 / training.max_workers


def keep_to_share(device: torch.device, training: Training) -> None:
    """From now on an allocation beyond the share fails in this process, where it would have failed in another's."""
    if is_shared(device):
        torch.cuda.set_per_process_memory_fraction(share(training), device)


def rehearse(passes: Pass, inputs: Tensor, targets: Tensor, *, most: int, records: int) -> int:
    """The largest of `most`, `most` / 2, ... records with which a pass fits, on the device of `inputs`.

    `inputs` [n, ...] and `targets` [n, ...] are public records, repeated as needed; `records` like them, as many as lie
    on the device while a partition trains, take their room meanwhile.

    Raises:
        Refused: not one record fits. Nothing has been charged.
    """
    size = most
    while size:
        if _fits(passes, inputs, targets, size, records):
            return size
        size //= 2
        log.warning("a pass does not fit in this worker's share of the GPU: tries %d records", size)
    raise Refused(
        Reason.MEMORY, "the GPU has no room for one record (fewer max_workers, a larger gpu_memory_fraction, or wait)"
    )


def _fits(passes: Pass, inputs: Tensor, targets: Tensor, size: int, records: int) -> bool:
    try:
        resident = [part.new_empty((records, *part.shape[1:])) for part in (inputs, targets)]
        chosen = torch.arange(size, device=inputs.device) % len(inputs)
        passes(inputs[chosen], targets[chosen])
        del resident
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    give_back(inputs.device)  # not in the handler, whose traceback still holds the tensors
    return fits


def give_back(device: torch.device) -> None:
    """Frees what the allocator keeps for later, so that other processes can have it."""
    if is_shared(device):
        torch.cuda.empty_cache()
