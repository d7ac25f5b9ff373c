"""The global model and the task's public test set: the only module of the server that computes with torch."""

import math

import torch

from common.tasks import Task, TaskError
from common.tasks.inputs import Inputs
from server.checkpoint import Arrays

_CHUNK = 1024  # records per forward pass


class Evaluation:
    """One model that is filled with the global parameters again and again."""

    def __init__(self, task: Task, *, seed: int) -> None:
        torch.manual_seed(seed)  # of a public model; private randomness is the clients' own
        self._task = task
        self._model = task.model().eval()
        self._test = task.test_data()
        self._inputs = Inputs.of(task)
        self._trainable = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        for name, parameter in self._trainable.items():
            if parameter.dtype != torch.float32:
                raise TaskError(f"task: parameter {name} is {parameter.dtype}; expected torch.float32")

    def arrays(self) -> Arrays:
        """The trainable parameters as they are now, by name."""
        return {name: p.detach().numpy().copy() for name, p in self._trainable.items()}

    def measure(self, arrays: Arrays) -> tuple[float | None, float | None]:
        """Accuracy and mean loss with these parameters. None: the targets are no classes; the loss is not finite."""
        right, loss, classes = 0, 0.0, not self._test.targets.is_floating_point()
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(torch.from_numpy(arrays[name]))
            for start in range(0, len(self._test), _CHUNK):
                inputs = self._test.inputs[start : start + _CHUNK]
                targets = self._test.targets[start : start + _CHUNK]
                outputs = self._model(self._inputs.evaluation(inputs))
                loss += float(self._task.loss(outputs, targets).sum(dtype=torch.float64))
                if classes:
                    right += int((outputs.argmax(dim=1) == targets).sum())
        mean = loss / len(self._test)
        return (right / len(self._test) if classes else None), (mean if math.isfinite(mean) else None)
