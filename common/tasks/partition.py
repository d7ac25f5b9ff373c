"""Which records of a data set play which owner's private partition: the shares of Flower's partitioners.

The splits are disjoint, complete and always the same: a record that moved to another partition would be
charged to another ledger.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner
    from torch import Tensor

_SEED = 20240229  # public: it draws the split, never noise
_ALPHA = 0.5


def iid(labels: Tensor, partition: int, partitions: int) -> list[int]:
    """Return the indices of one of `partitions` equal shares of the shuffled `labels`, [n].

    They are those of Flower's IidPartitioner, which takes seconds and 100 MB to import: the first shares are larger by
    one where the records cannot be shared out evenly.
    """
    _check(len(labels), partition, partitions)
    # RandomState, since NumPy promises that its stream never changes.
    order = np.random.RandomState(_SEED).permutation(len(labels))
    return [int(index) for index in np.array_split(order, partitions)[partition]]


def dirichlet(labels: Tensor, partition: int, partitions: int) -> list[int]:
    """Return the indices of one partition; each label is shared out by Dirichlet(0.5), arXiv:1905.12022."""
    from flwr_datasets.partitioner import DirichletPartitioner  # takes seconds to import

    _check(len(labels), partition, partitions)
    split = DirichletPartitioner(
        num_partitions=partitions, partition_by="label", alpha=_ALPHA, min_partition_size=1, seed=_SEED
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw that leaves a partition empty is repeated: nothing to act on
        try:
            return _indices(split, labels, partition)
        except ValueError as error:
            raise ValueError(f"partitions={partitions} leaves some without a record; use fewer") from error


def _check(records: int, partition: int, partitions: int) -> None:
    if not 1 <= partitions <= records:
        raise ValueError(f"expected partitions={partitions} in [1, {records}], the number of records")
    if not 0 <= partition < partitions:
        raise ValueError(f"expected partition={partition} in [0, {partitions})")


def _indices(split: Partitioner, labels: Tensor, partition: int) -> list[int]:
    from datasets import Dataset

    split.dataset = Dataset.from_dict({"index": range(len(labels)), "label": labels.numpy()})
    return list(split.load_partition(partition)["index"])
