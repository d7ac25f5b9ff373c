"""`python -m benchmarks.prepared_client --policy FILE`: joins as `python -m client` does, and answers noise untrained.

As many clients as a server can be given by one process: each takes in the whole model and sends as much back.
"""

import argparse
import threading
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from client.fleet import BrokenMessage, Fleet, FleetError, Node, pack, unpack
from common import messages
from common.config import Policy, load
from common.messages import ARRAYS, CONFIG, Proposal, Standing

_TRAINING_SECONDS = 3.0  # from a question to its reply, so that replies come together and not as questions went out
_AT_ONCE = 4  # transfers: their messages are all that this process holds
_POLL_SECONDS = 0.5
_CHUNK = 2**18  # numbers: less than the pieces in which Flower sends an array, so that no two replies share one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, required=True)
    policy = load(Policy, parser.parse_args().policy)
    fleet, transfers = Fleet(policy.client.server_address, policy.client.ca_certificate), threading.Semaphore(_AT_ONCE)
    for partition in policy.partitions:
        node = Node(fleet, policy.key_path(partition.name), policy.client.max_message_bytes)
        threading.Thread(target=_serve, args=(node, partition.name, transfers), daemon=True).start()
    threading.Event().wait()


def _serve(node: Node, partition: str, transfers: threading.Semaphore) -> None:
    while True:
        try:
            if not node.active:
                node.activate()
            if not _answer(node, partition, transfers):
                node.heartbeat()
        except (FleetError, BrokenMessage):
            pass  # the server is not there yet, or no longer
        time.sleep(_POLL_SECONDS)


def _answer(node: Node, partition: str, transfers: threading.Semaphore) -> bool:
    with transfers:
        inbound = node.receive()
        if inbound is None:
            return False
        message = unpack(inbound)
        shapes = {name: tuple(array.shape) for name, array in message.content[ARRAYS].items()}
        proposal = Proposal.from_record(message.content[CONFIG])
        del inbound
        message.content.clear()
    time.sleep(_TRAINING_SECONDS)
    standing = Standing(
        partition=partition,
        epsilon_spent=1.0,
        epsilon_budget=100.0,
        delta=1e-5,
        rounds_remaining=99,
        ledger_sequence=proposal.anchor_sequence + 2,
        ledger_head="0" * 64,
    )
    with transfers:
        arrays = ArrayRecord({name: Array(_noise(shape)) for name, shape in shapes.items()})
        node.send(pack(Message(messages.update(arrays, standing, weight=1.0), reply_to=message)), _TRAINING_SECONDS)
    return True


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that nobody else sends."""
    generator = np.random.default_rng()
    noise = np.full(int(np.prod(shape)), generator.normal(), np.float32)
    noise[::_CHUNK] = generator.normal(size=len(noise[::_CHUNK]))
    return noise.reshape(shape)


if __name__ == "__main__":
    main()
