"""From a round's updates to the next global model: a running average, and Flower's own strategies.

The state of the server's optimizer lives in the checkpoint, not in the strategy object, so that a run that was
interrupted goes on exactly as one that was not.
"""

import math

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from common.config import Federation
from common.messages import ARRAYS, METRICS, WEIGHT
from server.checkpoint import Arrays, Checkpoint
from server.replies import Update
from server.summation import WeightedSum

_MOMENTS = {"m": "m_t", "v": "v_t"}  # ours: FedAdam's


class NotFiniteError(ArithmeticError):
    """Finite updates made a model that is not; the checkpoint is unchanged."""


class Aggregation:
    """One round's average. Updates are added as they arrive and not kept; the order makes no difference.

    Its memory is four times the model's, however many updates there are.
    """

    def __init__(self, config: Federation, checkpoint: Checkpoint) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._sums: dict[str, WeightedSum] = {}
        self._weights: list[float] = []

    def add(self, update: Update) -> None:
        self._sums = self._sums or {name: WeightedSum(a.shape) for name, a in self._checkpoint.arrays.items()}
        for name, total in self._sums.items():
            total.add(update.arrays[name], update.weight)
        self._weights.append(update.weight)

    def finish(self, round: int) -> None:
        """Put the new model and the new moments into the checkpoint. Raises NotFiniteError."""
        if not self._weights:
            raise ValueError("expected at least one update")
        before = self._checkpoint
        adam = self._config.strategy == "fedadam"
        strategy = FedAvg(weighted_by_key=WEIGHT)
        if adam:
            strategy = FedAdam(weighted_by_key=WEIGHT, eta=self._config.server_learning_rate)
            strategy.current_arrays = dict(before.arrays)
            for ours, theirs in _MOMENTS.items():
                setattr(strategy, theirs, before.moments.get(ours))
        with np.errstate(all="ignore"):  # what overflows is found below
            aggregated, _ = strategy.aggregate_train(round, [self._average()])
        if aggregated is None:
            raise ValueError("expected an average")
        arrays = _float32({name: aggregated[name].numpy() for name in before.arrays})
        moments = {key: _float32(getattr(strategy, name)) for key, name in _MOMENTS.items()} if adam else {}
        if not all(np.isfinite(array).all() for part in (arrays, *moments.values()) for array in part.values()):
            raise NotFiniteError("the updates are finite but what they add up to is not")
        before.arrays, before.moments = arrays, moments

    def _average(self) -> Message:
        """The updates as the one that Flower's strategies want: an ArrayRecord, a MetricRecord and nothing else."""
        weight = math.fsum(self._weights)  # exact, so that its order makes no difference either
        arrays = ArrayRecord({name: Array(self._sums.pop(name).over(weight)) for name in list(self._sums)})
        content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: weight})})
        return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)


def record(arrays: Arrays) -> ArrayRecord:
    """The global model as it travels."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _float32(arrays: dict[str, np.ndarray]) -> Arrays:
    """FedAdam's step size is a float64, which makes the model one too."""
    return {name: np.asarray(array, dtype=np.float32, order="C") for name, array in arrays.items()}
