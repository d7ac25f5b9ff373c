"""From a round's updates to the next global model, by Flower's own strategies.

The state of the server's optimizer lives in the checkpoint, not in the strategy object, so that a run that was
interrupted goes on exactly as one that was not.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from common.config import Federation
from common.messages import ARRAYS, METRICS, WEIGHT
from server.checkpoint import Arrays, Checkpoint
from server.replies import Update

_MOMENTS = {"m": "m_t", "v": "v_t"}  # ours: FedAdam's


class NotFiniteError(ArithmeticError):
    """Finite updates made a model that is not; the checkpoint is unchanged."""


class Aggregation:
    """One round's average. Updates are added as they arrive; the order makes no difference."""

    def __init__(self, config: Federation, checkpoint: Checkpoint) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._updates: dict[str, Update] = {}

    def add(self, partition: str, update: Update) -> None:
        self._updates[partition] = update

    def finish(self, round: int) -> None:
        """Put the new model and the new moments into the checkpoint. Raises NotFiniteError."""
        before = self._checkpoint
        adam = self._config.strategy == "fedadam"
        strategy = FedAvg(weighted_by_key=WEIGHT)
        if adam:
            strategy = FedAdam(weighted_by_key=WEIGHT, eta=self._config.server_learning_rate)
            strategy.current_arrays = dict(before.arrays)
            for ours, theirs in _MOMENTS.items():
                setattr(strategy, theirs, before.moments.get(ours))
        with np.errstate(all="ignore"):  # what overflows is found below
            record, _ = strategy.aggregate_train(round, [_message(update) for update in self._sorted()])
        if record is None:
            raise ValueError("expected at least one update")
        arrays = _float32({name: record[name].numpy() for name in before.arrays})
        moments = {key: _float32(getattr(strategy, name)) for key, name in _MOMENTS.items()} if adam else {}
        if not all(np.isfinite(array).all() for part in (arrays, *moments.values()) for array in part.values()):
            raise NotFiniteError("the updates are finite but what they add up to is not")
        before.arrays, before.moments = arrays, moments

    def _sorted(self) -> list[Update]:
        return [self._updates[partition] for partition in sorted(self._updates)]


def record(arrays: Arrays) -> ArrayRecord:
    """The global model as it travels."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _float32(arrays: dict[str, np.ndarray]) -> Arrays:
    """FedAdam's step size is a float64, which makes the model one too."""
    return {name: np.asarray(array, dtype=np.float32, order="C") for name, array in arrays.items()}


def _message(update: Update) -> Message:
    """An update as Flower's strategies want it: one ArrayRecord, one MetricRecord and nothing else."""
    content = RecordDict({ARRAYS: update.arrays, METRICS: MetricRecord({WEIGHT: update.weight})})
    return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)
