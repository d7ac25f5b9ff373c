"""Attack: read everything that leaves the client, byte by byte, for a record, a count, a loss or a batch size.

What holds: planted ones are in no request, header, log at any level, metric or ledger, neither in an honest round nor
when the owner's own task fails with a record in its error, its warning, its threads or its finalizers.
"""

import contextlib
import logging
import re
import struct
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error
from torch import Tensor, nn

from client import app, job
from common.tasks import Data
from tests.attacks.site import Recorder, Site, moved, refusal, site
from tests.attacks.task import Rigged

# At rate 1 every batch holds all the records that are there, which are not as many as the owner says in public.
COUNT, NOMINAL = 1237, 1200
MARKER = b"Jo Doe 4"  # pixels
LABEL = 4711
LOSS = float(np.float32(31.415927))

TEXTS = {
    "a record": re.compile(rb"Jo Doe|74, ?111, ?32|74\.?0* +111|4a6f20446f65", re.IGNORECASE),
    "its label": re.compile(rb"(?<!\d)4711(?!\d)"),
    "the count or a batch size": re.compile(rb"(?<![\d.])1237(?!\d)"),
    "a loss": re.compile(rb"31\.41"),
}
BYTES = {
    "a record": [MARKER, np.frombuffer(MARKER, np.uint8).astype(np.float32).tobytes()[:16]],
    "its label": [struct.pack("<q", LABEL)],
    "the count or a batch size": [struct.pack("<q", COUNT), struct.pack("<d", COUNT)],
    "a loss": [struct.pack("<d", LOSS), struct.pack("<f", LOSS)],
}


def leaks(said: bytes) -> set[str]:
    """What of the planted things is in these bytes, as a text or as a number."""
    found = {name for name, pattern in TEXTS.items() if pattern.search(said)}
    return found | {name for name, forms in BYTES.items() if any(form in said for form in forms)}


def planted(task: Rigged) -> None:

    def owned(partition: int, _: int) -> Data:
        inputs = torch.zeros(COUNT, 1, 8, 8, dtype=torch.uint8)
        inputs[:, 0, ::2] = torch.frombuffer(bytearray(MARKER), dtype=torch.uint8)
        inputs[:, 0, 7] = partition  # or it would be the same data under another name
        return Data(inputs=inputs, targets=torch.arange(COUNT) % 10)

    task.patch.setattr(task, "owned", owned)
    losses = task.losses
    task.patch.setattr(task, "losses", lambda outputs, targets: losses(outputs, targets) * 1e-9 + LOSS)


def secret(task: Rigged) -> str:
    """All that an unlucky error could quote."""
    inputs = task.owned(0, 1).inputs
    return f"{inputs[0]} {MARKER!r} {bytes(inputs[0, 0, 0].tolist())!r} n={len(inputs)} loss={LOSS} label={LABEL}"


def fails_in_the_loss(task: Rigged) -> None:
    planted(task)

    def losses(outputs: Tensor, _: Tensor) -> Tensor:
        error = ValueError(secret(task), len(outputs))
        error.add_note(secret(task))
        raise error from KeyError(secret(task))

    task.patch.setattr(task, "losses", losses)


class Failing(nn.Module):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"{self.text}: {x[0].tolist()}, {len(x)} records")


def fails_in_the_model(task: Rigged) -> None:
    planted(task)
    text, make = secret(task), task.make_model
    task.patch.setattr(task, "make_model", lambda: nn.Sequential(Failing(text), *list(make())[1:]))


def fails_in_loading(task: Rigged) -> None:
    planted(task)
    text = secret(task)

    def owned(*_: Any) -> Data:
        raise OSError(5, text, text)

    task.patch.setattr(task, "owned", owned)


def has_a_label_outside_the_classes(task: Rigged) -> None:
    """All records, so that no batch can miss them."""
    planted(task)
    owned = task.owned

    def mislabelled(partition: int, partitions: int) -> Data:
        return Data(inputs=owned(partition, partitions).inputs, targets=torch.full((COUNT,), LABEL))

    task.patch.setattr(task, "owned", mislabelled)


def leaves_the_process(task: Rigged) -> None:
    planted(task)
    text = secret(task)

    def losses(*_: Any) -> Tensor:
        raise SystemExit(text)

    task.patch.setattr(task, "losses", losses)


class Finalized:
    def __init__(self, text: str) -> None:
        self.text = text

    def __del__(self) -> None:
        raise ValueError(self.text)


def chatters(task: Rigged) -> None:
    """Warns, and fails in a thread and in a finalizer: rounds that go on, while Python itself writes to stderr."""
    planted(task)
    losses, text = task.losses, secret(task)

    def in_a_thread() -> None:
        raise ValueError(text)

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        warnings.warn(text, UserWarning, stacklevel=1)
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        Finalized(text)
        return losses(outputs, targets)

    task.patch.setattr(task, "losses", noisy)


# Controls: each takes one guard out of the worker.


def tells_the_error(task: Rigged) -> None:
    fails_in_the_loss(task)
    task.patch.setattr(job, "Error", lambda code, **_: Error(code=code, reason=str(sys.exc_info()[1])))


def logs_the_error(task: Rigged) -> None:
    fails_in_the_loss(task)
    task.patch.setattr(job.log, "error", lambda *_: logging.getLogger("control").warning("failed", exc_info=True))


def tells_the_loss(task: Rigged) -> None:
    planted(task)
    losses = task.losses
    last: list[float] = []

    def noted(outputs: Tensor, targets: Tensor) -> Tensor:
        values = losses(outputs, targets)
        last.append(float(values.detach()[0]))
        return values

    task.patch.setattr(task, "losses", noted)
    update = app.messages.update
    task.patch.setattr(app.messages, "update", lambda *parts, **_: update(*parts, weight=last[-1]))


def tells_the_count(task: Rigged) -> None:
    planted(task)
    update = app.messages.update
    task.patch.setattr(app.messages, "update", lambda *parts, **_: update(*parts, weight=float(COUNT)))


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    terms = {"batch_size": NOMINAL, "records": NOMINAL, "noise_multiplier": 30.0, "delta": 1e-5}
    with site(tmp_path_factory.mktemp("leaves"), clients=13, privacy=terms, fleet=Recorder()) as made:
        made.start(
            variant="verbose", FLWR_LOG_LEVEL="DEBUG", GRPC_VERBOSITY="DEBUG", PYTHONWARNINGS="always",
            PYTHONFAULTHANDLER="1", TORCH_SHOW_CPP_STACKTRACES="1",
        )  # fmt: skip
        yield made


def everything(owner: Site) -> bytes:
    """All that left since the start: to the server, to the logs, to who asks for metrics, and into the ledgers."""
    said = list(owner.fleet.heard)  # type: ignore[attr-defined]
    for path in ("metrics", "healthz", "nothing"):
        with contextlib.suppress(urllib.error.HTTPError):
            url = f"http://127.0.0.1:{owner.run.client_metrics}/{path}"
            with urllib.request.urlopen(url, timeout=10) as response:
                said += [str(response.headers).encode(), response.read()]
    said += [(owner.folder / "client.log").read_bytes()]
    said += [path.read_bytes() for path in (owner.folder / "state/clients").glob("*/*")]
    return b"\n".join(said)


HONEST: dict[Callable[[Rigged], None], str] = {
    planted: "",
    chatters: "",
    fails_in_the_loss: "ValueError",
    fails_in_the_model: "RuntimeError",
    has_a_label_outside_the_classes: "IndexError",
    fails_in_loading: "data",
    leaves_the_process: "the worker died",
}


def test_nothing_that_was_planted_leaves(owner: Site) -> None:
    moved(owner.ask(0))
    for partition, (order, outcome) in enumerate(HONEST.items(), start=1):
        owner.order(order)
        reply = owner.ask(partition)
        assert owner.account(partition).epsilon_spent > 0, order.__name__  # it was charged, so the records were read
        if not outcome:
            moved(reply)
        else:
            assert (refusal(reply) or reply.error.reason) == outcome, order.__name__
        said = everything(owner)
        assert leaks(said) == set(), (order.__name__, owner.run.log("client")[-3000:])
    log = owner.run.log("client")
    assert "UserWarning at " in log  # what did happen is told, without its values
    assert log.count("ERROR client.zygote: ValueError at ") >= 2
    assert " DEBUG " in log  # and this is the talkative client
    assert b"public-key" in said.lower()


CONTROLS: dict[Callable[[Rigged], None], set[str]] = {
    tells_the_count: {"the count or a batch size"},
    tells_the_loss: {"a loss"},
    tells_the_error: set(TEXTS),
    logs_the_error: set(TEXTS),
}


def test_what_a_client_with_a_hole_says_is_found(owner: Site) -> None:
    """After the test above, as whatever it lets out stays where it is found."""
    owner.order(None)
    moved(owner.ask(0))
    seen: set[str] = set()
    for partition, (order, expected) in enumerate(CONTROLS.items(), start=9):
        owner.fleet.heard.clear()  # type: ignore[attr-defined]
        (owner.folder / "client.log").write_bytes(b"")  # it is appended to
        owner.order(order)
        owner.ask(partition)
        seen = leaks(everything(owner))
        assert seen >= expected, order.__name__


@pytest.mark.parametrize(
    "said",
    [b"x=tensor([ 74, 111, 32, 68])", b"[74,111,32", b"Jo Doe 4", b"4a6f20446f65", b"n=1237,", b"31.4159", b"t 4711 "],
)
def test_the_search_sees_what_is_there(said: bytes) -> None:
    assert len(leaks(said)) == 1
    assert leaks(b"port 41237 at 0.1237 and 147110") == set()
