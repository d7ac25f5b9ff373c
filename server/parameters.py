"""The parameters in one update, held against the model that was sent: believed are neither shapes nor numbers."""

import io
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord

from common.compression import unpack, wire
from common.config import Compression
from common.messages import MessageError
from server.checkpoint import Arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What an update of one round must hold: the parameters of `model`, packed as the server proposed."""

    model: Arrays
    compression: Compression = "none"

    @property
    def wire_bytes(self) -> int:
        """The size of an update, without its small records."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            for shape, kind in wire(self.model, self.compression).values()
        )

    def read(self, record: object) -> Arrays:
        """An update's parameters, all finite. Raises MessageError, or what NumPy raises about malformed bytes."""
        expected = wire(self.model, self.compression)
        if not isinstance(record, ArrayRecord) or set(record) != set(expected):
            raise MessageError(f"expected the {len(expected)} arrays of the model")
        arrays = {}
        for name, (shape, kind) in expected.items():
            found = _header(record[name])
            if found != (shape, kind):
                raise MessageError(f"{name}: expected {kind} of shape {shape}, found {found[1]} of {found[0]}")
            arrays[name] = record[name].numpy()
        values = unpack(arrays, self.model, self.compression)
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise MessageError(f"{name}: expected finite values")
        return values


def _header(array: Array) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and type from the bytes themselves. NumPy would allocate whatever they claim before it looks further."""
    stream = io.BytesIO(array.data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise MessageError(f"expected an array in format 1.0, found {version}")
    shape, _, kind = np.lib.format.read_array_header_1_0(stream)
    return shape, kind
