"""One daemon and one build for all tests here; the images' layers stay in the cache for the next time."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.containers import machine
from tests.containers.stack import PROMETHEUS, Stack, copy_checkout

# A proxy for loopback would be asked for what only this machine can answer.
os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.0/8", "127.0.0.2"]))


@pytest.fixture(scope="session")
def docker() -> Iterator[dict[str, str]]:
    with machine.daemon() as environment:
        machine.ensure_base(environment)
        yield environment
        machine.forget_old_layers(environment)


@pytest.fixture(scope="session")
def stack(docker: dict[str, str]) -> Iterator[Stack]:
    """Built, and not up."""
    folder = machine.CACHE / "checkout"
    copy_checkout(folder)
    stack = Stack(folder, docker, CLIENTS="3", ROUNDS="60", NOISE_MULTIPLIER="6.0")
    stack.compose("down", "--volumes", "--remove-orphans")
    started = time.monotonic()
    for stage in ("server-packages", "client-packages"):  # with a name, or they would be forgotten with the old layers
        stack.build(stage)
    stack.compose("build", "setup", "server", "client")
    print(f"\nthe images were built in {time.monotonic() - started:.0f} s (seconds: from the cache)")
    recipe = folder / "tests/containers"
    stack.docker(
        *("build", "--file", str(recipe / "prometheus.Dockerfile"), "--tag", PROMETHEUS),
        *("--build-arg", f"BASE_IMAGE={machine.BASE}", str(recipe)),
    )
    yield stack
    stack.compose("down", "--volumes", "--remove-orphans")
