"""The recipe of Flower's own Opacus example, without Flower: what its clients compute, one after another.

Its network, SGD with momentum 0.9 that starts anew in each round, batches of 32, one pass a round, clipping norm 1,
noise 1.0 for partitions with an even number and 1.5 for the others, FedAvg. Its pictures are in colour: the first layer
takes grey ones here, and pads those that are too small for it. In its favour, messages, TLS and a process per message
are left out, and each partition trains on all records, where the example holds out a fifth.
"""

import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from client.accounting import Release
from common.tasks import Task, load_task

BATCH, BOUND, MOMENTUM, LEARNING_RATE, DELTA = 32, 1.0, 0.9, 0.001, 1e-5
NOISE = (1.0, 1.5)  # of even partitions, of odd ones
_CHUNK = 1000


def release(records: int, rounds: int) -> Release:
    """What `rounds` passes cost a partition with the least noise. A batch has 1 / (batches in a pass) as its rate."""
    batches = -(-records // BATCH)
    return Release(noise_multiplier=NOISE[0], sample_rate=1 / batches, steps=rounds * batches)


def train(task: str, root: Path, *, clients: int, rounds: int, learning_rate: float) -> Iterator[tuple[float, float]]:
    """After each round: CPU seconds of this process since it began, tests excepted, and test accuracy."""
    from opacus import PrivacyEngine

    warnings.simplefilter("ignore")
    logging.getLogger("opacus").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    source, testing = load_task(task, root), 0.0
    loaders = [_loader(source, client, clients) for client in range(clients)]
    test = source.test_data()
    pixels = _scaled(test.inputs)
    shared = _network(pixels).state_dict()
    criterion = nn.CrossEntropyLoss()
    for _ in range(rounds):
        trained = []
        for client, loader in enumerate(loaders):
            network = _network(pixels)
            network.load_state_dict(shared)
            private, optimizer, drawn = PrivacyEngine().make_private(
                module=network,
                optimizer=torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=MOMENTUM),
                data_loader=loader,
                noise_multiplier=NOISE[client % 2],
                max_grad_norm=BOUND,
            )
            for inputs, targets in drawn:
                optimizer.zero_grad()
                criterion(private(inputs), targets).backward()
                optimizer.step()
            trained.append(network.state_dict())
        shared = {name: torch.stack([each[name] for each in trained]).mean(0) for name in shared}
        done = time.process_time()
        accuracy = _accuracy(shared, pixels, test.targets)
        yield done - testing, accuracy
        testing += time.process_time() - done


def _loader(task: Task, client: int, clients: int) -> DataLoader:
    data = task.train_data(client, clients)
    return DataLoader(TensorDataset(_scaled(data.inputs), data.targets), batch_size=BATCH)


def _scaled(pixels: Tensor) -> Tensor:
    """[n, 1, height, width] in [-1, 1], as the example normalises."""
    return pixels.float() / (127.5 if pixels.shape[-1] == 28 else 8.0) - 1


def _network(pixels: Tensor) -> nn.Module:
    size = pixels.shape[-1]
    around = 2 if size < 28 else 0
    left = ((size - 4 + 2 * around) // 2 - 4 + 2 * around) // 2
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=around), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5, padding=around), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * left**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def _accuracy(parameters: dict[str, Tensor], pixels: Tensor, targets: Tensor) -> float:
    network = _network(pixels)
    network.load_state_dict(parameters)
    with torch.no_grad():
        right = sum(
            int((network(pixels[first : first + _CHUNK]).argmax(1) == targets[first : first + _CHUNK]).sum())
            for first in range(0, len(pixels), _CHUNK)
        )
    return right / len(pixels)
