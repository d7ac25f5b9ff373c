"""A running average: what Flower's strategies make of all updates at once, in any order, in constant memory."""

import itertools
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from common.config import Federation, parse
from common.messages import Standing
from server.aggregation import Aggregation
from server.checkpoint import Checkpoint
from server.replies import Update
from server.summation import WeightedSum
from tests.wire import identify

SHAPES = {"layer.weight": (40, 30), "layer.bias": (40,), "scale": (), "none": (0, 3)}


@pytest.fixture(autouse=True)
def _identity() -> None:
    identify()


def arrays(seed: int, spread: float = 1.0) -> dict[str, Any]:
    """Numbers whose sizes differ by up to 10 ** (2 * spread)."""
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(
            generator.normal(size=shape) * 10.0 ** generator.uniform(-spread, spread, size=shape), np.float32
        )
        for name, shape in SHAPES.items()
    }


def updates(count: int, spread: float = 1.0, weights: tuple[float, ...] = (1.0,)) -> list[Update]:
    standing = Standing(
        partition="a", epsilon_spent=1.0, epsilon_budget=3.0, delta=1e-5, rounds_remaining=1, ledger_sequence=2,
        ledger_head="h",
    )  # fmt: skip
    return [
        Update(arrays=arrays(index + 1, spread), weight=weights[index % len(weights)], standing=standing)
        for index in range(count)
    ]


def aggregate(made: list[Update], strategy: str = "fedavg", rounds: int = 1) -> Checkpoint:
    settings = parse(Federation, {"steps_per_round": 1, "learning_rate": 1.0, "strategy": strategy}, source="test")
    state = Checkpoint(run="one", digest="", arrays=arrays(0))
    for number in range(1, rounds + 1):
        aggregation = Aggregation(settings, state)
        for update in made:
            aggregation.add(update)
        aggregation.finish(number)
    return state


def library(made: list[Update], strategy: Any, rounds: int = 1) -> dict[str, Any]:
    """What Flower's own strategy makes of all updates at once."""
    messages = [
        Message(
            RecordDict({
                "arrays": ArrayRecord({name: Array(np.asarray(array)) for name, array in update.arrays.items()}),
                "metrics": MetricRecord({"weight": update.weight}),
            }),
            dst_node_id=0,
            message_type="train",
        )
        for update in made
    ]  # fmt: skip
    strategy.current_arrays = arrays(0)
    for number in range(1, rounds + 1):
        record, _ = strategy.aggregate_train(number, messages)
        strategy.current_arrays = {name: array.numpy().astype(np.float32) for name, array in record.items()}
    return strategy.current_arrays


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 3.0), (0.1, 7.3, 2.2), (1e-6, 1e9)])
@pytest.mark.parametrize("count", [1, 2, 13])
def test_the_average_is_flowers(count: int, weights: tuple[float, ...]) -> None:
    made = updates(count, weights=weights)
    ours, theirs = aggregate(made).arrays, library(made, FedAvg(weighted_by_key="weight"))
    for name in SHAPES:
        assert ours[name].dtype == np.float32
        assert ours[name].shape == SHAPES[name]
        largest = max((np.abs(update.arrays[name]).max(initial=0.0) for update in made), default=0.0)
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=4e-7 * largest)


def test_fedadam_takes_the_average_as_one_update() -> None:
    made = updates(9, weights=(1.0, 2.5))
    state = aggregate(made, "fedadam", rounds=3)
    flower = FedAdam(weighted_by_key="weight", eta=0.1)
    theirs = library(made, flower, rounds=3)
    for name in SHAPES:
        np.testing.assert_allclose(state.arrays[name], theirs[name], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(state.moments["m"][name], flower.m_t[name], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.moments["v"][name], flower.v_t[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.3, 1.7, 12.9)])
def test_the_average_is_the_exact_one_rounded_once(weights: tuple[float, ...]) -> None:
    made = updates(7, spread=3.0, weights=weights)
    found = aggregate(made).arrays["layer.weight"].reshape(-1)
    total = sum(Fraction(update.weight) for update in made)
    for index in range(0, found.size, 37):
        exact = sum(
            Fraction(float(np.float64(update.weight) * np.float64(update.arrays["layer.weight"].reshape(-1)[index])))
            for update in made
        )
        assert found[index] == np.float32(float(exact / total))


def plain_sum(made: list[Update], name: str) -> Any:
    """The same in float64 alone."""
    total = np.zeros(SHAPES[name])
    for update in made:
        total += update.arrays[name].astype(np.float64) * update.weight
    return (total / sum(update.weight for update in made)).astype(np.float32)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_the_order_makes_no_difference(strategy: str) -> None:
    made = updates(5, spread=4.0, weights=(1.0, 0.7, 1.9))
    opposite = [Update(arrays={k: -a for k, a in u.arrays.items()}, weight=u.weight, standing=u.standing) for u in made]
    made += opposite[:-1]  # most of it cancels, which leaves the rounding errors bare
    orders = [*itertools.islice(itertools.permutations(made), 0, 5000, 997), made[::-1], made]
    models = [aggregate(order, strategy) for order in orders]
    for model in models[1:]:
        for name in SHAPES:
            assert model.arrays[name].tobytes() == models[0].arrays[name].tobytes()
    assert len({plain_sum(order, "layer.weight").tobytes() for order in orders}) > 1  # what float64 alone would do


def test_a_mean_halfway_between_two_numbers_is_rounded_the_same_in_any_order() -> None:
    one = np.float32(1.0)
    terms = [one, np.nextafter(one, np.float32(2)), np.float32(2.0**-40), np.float32(-(2.0**-40))]
    found = set()
    for order in itertools.permutations(terms):
        total = WeightedSum(())
        for term in order:
            total.add(np.asarray(term), 1.0)
        found.add(float(total.over(2.0)))
    assert found == {1.0}


def test_memory_does_not_grow_with_the_updates() -> None:
    settings = parse(Federation, {"steps_per_round": 1, "learning_rate": 1.0}, source="test")
    model = {"weight": np.zeros(10**6, np.float32)}
    standing = updates(1)[0].standing
    peaks = []
    for count in (5, 50):
        state = Checkpoint(run="one", digest="", arrays=model)
        tracemalloc.start()
        aggregation = Aggregation(settings, state)
        for _ in range(count):
            aggregation.add(Update(arrays={"weight": np.ones(10**6, np.float32)}, weight=1.0, standing=standing))
        aggregation.finish(1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(state.arrays["weight"], np.ones(10**6, np.float32))
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] < 12 * 4e6
