"""`python -m local.records TASK ROOT PARTITIONS` prints the nominal, public size of one partition.

A process of its own, since a task imports torch, which would cost the runner its memory for the whole run.
"""

import subprocess
import sys
from pathlib import Path

from common.tasks import TaskError, load_task
from local.errors import LocalError


def nominal_records(task: str, root: Path, partitions: int) -> int:
    """What the task says about a split into so many.

    Raises:
        LocalError: the task cannot be loaded or cannot be split so.
    """
    command = [sys.executable, "-m", "local.records", task, str(root), str(partitions)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or [f"its process ended with {ended.returncode}"])[-1]
        raise LocalError(f"TASK={task} CLIENTS={partitions}: {last}")
    return int(ended.stdout.split()[-1])


def main(arguments: list[str]) -> int:
    task, root, partitions = arguments
    try:
        print(load_task(task, Path(root)).nominal_records(int(partitions)))
    except (TaskError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
