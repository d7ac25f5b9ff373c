"""`python -m client --policy config/policy.yaml`: one process for all partitions of the policy, or for one of them."""

import argparse
import logging
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from client.claim import claimed
from client.zygote import start_zygote
from common.config import ConfigError, Policy, load
from common.logs import start_logging

log = logging.getLogger("client")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m client", description="Trains for its owner's partitions.")
    parser.add_argument("--policy", type=Path, default=Path("config/policy.yaml"), help="the owner's policy.yaml")
    parser.add_argument("--claim", action="store_true", help="serve one partition, which no other --claim serves")
    options = parser.parse_args(arguments)
    start_logging()
    with ExitStack() as stack:
        try:
            policy = load(Policy, options.policy)
            if options.claim:
                policy = stack.enter_context(claimed(policy))
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        return _serve(policy)


def _serve(policy: Policy) -> int:
    zygote = start_zygote(policy)  # first: a fork after this would copy threads and connections

    from client.host import HostError, run  # it imports gRPC

    stop = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        log.info("%s: leaving", signal.Signals(number).name)
        stop.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    try:
        run(policy, zygote, stop)
    except HostError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
