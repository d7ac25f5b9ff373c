"""Smaller updates: what the server may propose, a client packs and the server unpacks.

Only noised parameters are packed, so that nothing here touches the guarantee: it is post-processing. Lossless methods
are not offered: noise has no pattern, and zlib and lzma take 7 % off (benchmarks/compression.py).

`int8`: of each parameter travels the difference to the model that was received, in steps of a 127th of its largest.
What is rounded off is far less than the noise, whose width spans many steps, and averages out over clients with it.
All parameters are one array of bytes, since each array is several calls to SuperLink: first the step of each parameter
as a little-endian float32, then the multiples of each, both in the order of the names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from common.config import Compression

PACKED = "packed"  # the name of the one array

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Wire = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]  # shape and type of each array that travels

_STEP = np.dtype("<f4")
_MOST = 127


def pack(values: Mapping[str, Float32], received: Callable[[str], Float32], compression: Compression) -> ArrayRecord:
    """The record of noised parameters that travels to the server that sent the parameters `received`."""
    if compression == "none":
        return ArrayRecord({name: Array(value) for name, value in values.items()})
    steps, multiples = [], []
    for name in sorted(values):
        step, quantized = _quantize(values[name], received(name))
        steps.append(step)
        multiples.append(quantized)
    packed = [np.array(steps, _STEP).view(np.uint8), *(each.view(np.uint8) for each in multiples)]
    return ArrayRecord({PACKED: Array(np.concatenate(packed))})


def wire(model: Mapping[str, Float32], compression: Compression) -> Wire:
    """What travels of an update of `model`."""
    if compression == "none":
        return {name: (array.shape, np.dtype(np.float32)) for name, array in model.items()}
    size = _STEP.itemsize * len(model) + sum(array.size for array in model.values())
    return {PACKED: ((size,), np.dtype(np.uint8))}


def unpack(
    arrays: Mapping[str, np.ndarray[Any, Any]], received: Mapping[str, Float32], compression: Compression
) -> dict[str, Float32]:
    """The parameters in `arrays`, whose shapes and types are those of `wire`. They may not be finite."""
    if compression == "none":
        return dict(arrays)
    packed, names = arrays[PACKED], sorted(received)
    start = _STEP.itemsize * len(names)
    steps, values = packed[:start].view(_STEP), {}
    for name, step in zip(names, steps, strict=True):
        before = received[name]
        multiples = packed[start : start + before.size].view(np.int8)
        start += before.size
        with np.errstate(all="ignore"):  # what is not finite is the caller's to find
            value = multiples.astype(np.float32)
            value *= np.float32(step)
            value += before.reshape(-1)
        values[name] = value.reshape(before.shape)
    return values


def _quantize(value: Float32, received: Float32) -> tuple[np.float32, np.ndarray[Any, np.dtype[np.int8]]]:
    with np.errstate(all="ignore"):  # parameters that are not finite make a step that is not, which the server refuses
        difference = (value - received).reshape(-1)
        step = np.float32(np.abs(difference).max(initial=0.0) / _MOST)
        if not (step > 0 and np.isfinite(step)):
            return step, np.zeros(difference.size, np.int8)
        return step, np.clip(np.rint(difference / step), -_MOST, _MOST).astype(np.int8)
