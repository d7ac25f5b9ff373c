"""Packed updates: small, close, and no way around the checks."""

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from common.compression import pack, unpack
from common.messages import MessageError, digest
from server.parameters import Parameters

SHAPES = {"weight": (30, 20), "bias": (30,), "scale": (), "none": (0, 3)}
RECEIVED = {name: np.asarray(np.random.default_rng(1).normal(size=shape), np.float32) for name, shape in SHAPES.items()}
PARAMETERS = Parameters(model=RECEIVED, compression="int8")


def noised(width: float = 0.1, seed: int = 2) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(value + generator.normal(0, width, value.shape), np.float32)
        for name, value in RECEIVED.items()
    }


def packed(values: dict[str, Any]) -> ArrayRecord:
    return pack(values, RECEIVED.__getitem__, "int8")


@pytest.mark.parametrize("width", [0.0, 1e-30, 1e-3, 10.0, 1e30])
def test_what_is_rounded_off_is_at_most_half_a_step(width: float) -> None:
    values = noised(width)
    found = PARAMETERS.read(packed(values))
    for name, value in values.items():
        step = np.abs(value - RECEIVED[name]).max(initial=0.0) / 127
        assert found[name].dtype == np.float32
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=0.501 * step + 1e-38)


def test_the_error_is_small_beside_the_noise_and_averages_out() -> None:
    received = {"weight": np.zeros(10**5, np.float32)}
    errors = []
    for seed in range(20):
        value = np.random.default_rng(seed).normal(0, 1, 10**5).astype(np.float32)
        record = pack({"weight": value}, received.__getitem__, "int8")
        errors.append(Parameters(model=received, compression="int8").read(record)["weight"] - value)
    assert np.std(errors[0]) < 0.015  # of the noise
    assert np.std(np.mean(errors, axis=0)) == pytest.approx(np.std(errors[0]) / math.sqrt(20), rel=0.05)
    assert abs(np.mean(errors)) < 1e-4


def test_a_quarter_of_the_bytes() -> None:
    bare = Parameters(model=RECEIVED)
    assert bare.wire_bytes == 4 * (600 + 30 + 1)
    assert PARAMETERS.wire_bytes == 600 + 30 + 1 + 4 * len(SHAPES)
    wire = sum(array.numpy().nbytes for array in packed(noised()).values())
    assert wire == PARAMETERS.wire_bytes


def test_none_is_the_parameters_themselves() -> None:
    values = noised()
    record = pack(values, RECEIVED.__getitem__, "none")
    found = Parameters(model=RECEIVED).read(record)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value, strict=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_update_is_refused_packed_or_not(value: float) -> None:
    values = noised()
    values["weight"][3, 4] = value
    with pytest.raises(MessageError, match="weight: expected finite"):
        PARAMETERS.read(packed(values))
    with pytest.raises(MessageError, match="weight: expected finite"):
        Parameters(model=RECEIVED).read(pack(values, RECEIVED.__getitem__, "none"))


def wire(**changes: Any) -> Any:
    """An honest update on the wire, with a few of its bytes replaced. It begins with the step of `bias`."""
    array = packed(noised())["packed"].numpy().copy()
    for at, some in changes.items():
        array[int(at[1:]) :][: len(some)] = np.frombuffer(some, np.uint8)
    return array


def step(value: float) -> Any:
    return wire(_0=np.float32(value).tobytes())


@pytest.mark.parametrize(
    ("lie", "found"),
    {
        "a step that is NaN": (step(math.nan), "bias: expected finite"),
        "an endless step": (step(math.inf), "bias: expected finite"),
        "a step that overflows": (step(3e38), "bias: expected finite"),
        "too short": (wire()[:-1], r"packed: expected uint8 of shape \(647,\), found uint8 of \(646,\)"),
        "too long": (np.append(wire(), np.uint8(0)), r"found uint8 of \(648,\)"),
        "no steps": (wire()[16:], r"found uint8 of \(631,\)"),
        "empty": (wire()[:0], r"found uint8 of \(0,\)"),
        "signed": (wire().view(np.int8), "found int8"),
        "words": (np.zeros(647, "<u2"), "found uint16"),
        "not packed": (np.zeros(647, np.float32), r"found float32 of \(647,\)"),
        "one more dimension": (wire()[None], r"found uint8 of \(1, 647\)"),
        "objects": (Array("object", (647,), "numpy.ndarray", b"\x93NUMPY\x01\x00"), "header"),
        "rubbish": (Array("uint8", (647,), "numpy.ndarray", b"rubbish"), "magic"),
        "half of it": (Array("uint8", (647,), "numpy.ndarray", Array(wire()).data[:400]), "."),
    }.values(),
)  # fmt: skip
def test_a_malformed_update_is_refused(lie: Any, found: str) -> None:
    record = ArrayRecord({"packed": lie if isinstance(lie, Array) else Array(lie)})
    with pytest.raises(ValueError, match=found):  # a MessageError is one
        PARAMETERS.read(record)


@pytest.mark.parametrize("names", [(), ("Packed",), ("packed", "more"), tuple(SHAPES)])
def test_other_arrays_than_the_one_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(MessageError, match="expected the 1 arrays"):
        PARAMETERS.read(ArrayRecord({name: Array(wire()) for name in names}))


def test_the_form_that_was_not_asked_for_is_refused() -> None:
    with pytest.raises(MessageError, match="expected the 4 arrays"):
        Parameters(model=RECEIVED).read(packed(noised()))
    with pytest.raises(MessageError, match=r"expected float32 .*, found uint8"):
        Parameters(model={"packed": np.zeros(647, np.float32)}).read(packed(noised()))


def test_the_digest_covers_steps_and_multiples() -> None:
    wires = wire(), wire(_3=b"\x01"), wire(_16=b"\x01"), wire(_646=b"\x01"), step(7.0)
    assert len({digest(ArrayRecord({"packed": Array(array)})) for array in wires}) == 5


def test_a_negative_or_extreme_multiple_is_a_number_like_any_other() -> None:
    array = np.zeros(6, np.uint8)
    array[:4].view("<f4")[0] = -0.5
    array[4:].view(np.int8)[:] = (-128, 127)
    found = unpack({"packed": array}, {"weight": np.float32([1, 1])}, "int8")
    np.testing.assert_array_equal(found["weight"], np.float32([65, -62.5]))
