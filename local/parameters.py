"""NAME=VALUE arguments laid over the two files of `config/`: the terms of a run, checked before it starts.

What is not given keeps the files' value. Another task or number of clients is another split of the data, with
partitions, and thus ledgers, of its own.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from common.config import Federation, Policy, parse
from common.tasks import SHIPPED
from local import steps
from local.errors import LocalError

Records = Callable[[str, Path, int], int]  # task, folder of its data, partitions -> nominal size of each


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What was given; None is not given. The fields are the parameters' names in lower case."""

    clients: int | None = None  # partitions, all held by one client process
    min_clients: int | None = None  # connected before the first round starts
    fit_clients: int | None = None  # sampled in each round
    rounds: int | None = None
    batch_size: int | None = None  # expected records in a Poisson batch
    physical_batch_size: int | None = None  # records per forward pass
    lr: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    epsilon: float | None = None  # budget of each partition, over all runs
    task: str | None = None


Given = TypeVar("Given")

_FLOATS = ("LR", "NOISE_MULTIPLIER", "MAX_GRAD_NORM", "EPSILON", "DELTA")


def names(of: Any) -> tuple[str, ...]:
    """How the fields of a class of parameters are written."""
    return tuple(field.name.upper() for field in fields(of))


NAMES = names(Parameters)


def read(arguments: Sequence[str]) -> Parameters:
    """The parameters of a run; see `read_as`."""
    return read_as(Parameters, arguments)


def read_as(kind: type[Given], arguments: Sequence[str]) -> Given:
    """The parameters in `arguments`, each NAME=VALUE, as a dataclass whose fields are their names in lower case.

    Raises:
        LocalError: an unknown name, a value out of range or of another type, a name given twice.
    """
    given: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise LocalError(f"{argument}: expected NAME=VALUE, as ROUNDS=3")
        if name not in names(kind):
            close = get_close_matches(name.upper(), names(kind), n=1, cutoff=0.5)
            fix = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names(kind))}"
            raise LocalError(f"{argument}: unknown parameter {name!r} ({fix})")
        if name.lower() in given:
            raise LocalError(f"{argument}: {name} is given twice (keep one)")
        given[name.lower()] = _value(name, text.strip())
    return kind(**given)


def apply(given: Parameters, federation: Federation, policy: Policy, records: Records) -> tuple[Federation, Policy]:
    """The two files with the parameters in them. `records` is asked only about another split than theirs.

    Raises:
        LocalError: parameters that do not go together, or do not fit the data.
        ConfigError: the result breaks a rule of the files.
    """
    if federation.task != policy.task:
        raise LocalError(
            f"task: federation.yaml has {federation.task!r}, policy.yaml {policy.task!r} (make them the same)"
        )
    task = given.task or policy.task
    clients = given.clients or len(policy.partitions)
    same_split = task == policy.task and clients == len(policy.partitions)
    server, client = federation.model_dump(mode="json"), policy.model_dump(mode="json")
    privacy = client["privacy"]

    server["task"] = client["task"] = task
    if not same_split:
        server["min_clients"] = server["fit_clients"] = clients
        client["partitions"] = [_partition(task, index, clients) for index in range(clients)]
        privacy["records"] = records(task, policy.data_root, clients)
        privacy["batch_size"] = min(privacy["batch_size"], privacy["records"])
    if given.min_clients is not None:
        server["min_clients"] = server["fit_clients"] = given.min_clients
    _set(server, fit_clients=given.fit_clients, rounds=given.rounds, learning_rate=given.lr)
    _set(
        privacy,
        batch_size=given.batch_size,
        noise_multiplier=given.noise_multiplier,
        max_grad_norm=given.max_grad_norm,
        epsilon=given.epsilon,
        accounting="adaptive",  # its user changes the mechanism between runs
    )
    _set(client["training"], physical_batch_size=given.physical_batch_size)
    _require_order(server, clients)
    at_most("BATCH_SIZE", privacy["batch_size"], privacy["records"], "the nominal records of a partition")
    at_most("LR", server["learning_rate"], policy.training.max_learning_rate, "training.max_learning_rate")
    files = parse(Federation, server, source="federation.yaml"), parse(Policy, client, source="policy.yaml")
    if same_split and given.batch_size in (None, policy.privacy.batch_size):
        return files
    server["steps_per_round"] = privacy["max_steps_per_round"] = steps.affordable(
        files[1].privacy, steps.rounds_each(files[0], clients)
    )
    return parse(Federation, server, source="federation.yaml"), parse(Policy, client, source="policy.yaml")


def _value(name: str, text: str) -> int | float | str:
    if name == "TASK":
        if text not in SHIPPED and ":" not in text:
            fix = f"expected {', '.join(SHIPPED)}, or module:attribute"
            raise LocalError(f"TASK={text}: unknown task ({fix})")
        return text
    if name in _FLOATS:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise LocalError(f"{name}={text}: expected a number above 0, as {name}=1.0")
        return number
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise LocalError(f"{name}={text}: expected a whole number of at least 1, as {name}=10")
    return int(text)


def _partition(task: str, index: int, of: int) -> dict[str, Any]:
    prefix = re.sub(r"[^a-z0-9._-]", "-", task.lower())  # a task of one's own is named module:attribute
    return {"name": f"{prefix}-{index}-of-{of}", "index": index, "of": of}


def _set(section: dict[str, Any], **values: Any) -> None:
    section.update({key: value for key, value in values.items() if value is not None})


def _require_order(server: dict[str, Any], clients: int) -> None:
    least, fit = server["min_clients"], server["fit_clients"]
    at_most("MIN_CLIENTS", least, clients, "CLIENTS: no more can connect")
    at_most("FIT_CLIENTS", fit, least, "MIN_CLIENTS: a round samples among those")


def at_most(name: str, value: float, most: float, what: str) -> None:
    """Raises LocalError where `value` is more than `most`; `what` says why no more is possible."""
    if value > most:
        raise LocalError(f"{name}={value}: expected at most {most} ({what})")
