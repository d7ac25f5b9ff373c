"""What a run leaves behind when it ends: `model.safetensors`, `summary.json` and `report.html`."""

import json
from pathlib import Path

import safetensors.numpy

from common.config import Federation
from common.files import replace
from server import report
from server.checkpoint import Checkpoint
from server.history import last_round


def write(directory: Path, config: Federation, checkpoint: Checkpoint, *, reason: str) -> None:
    """Write them into the run's directory; what an earlier end of the same run wrote is replaced."""
    replace(directory / "model.safetensors", safetensors.numpy.save(checkpoint.arrays))
    last = last_round(directory) or {}
    summary = {
        "run": checkpoint.run,
        "task": config.task,
        "strategy": config.strategy,
        "reason": reason,
        "rounds_completed": checkpoint.round,
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "seconds": round(checkpoint.seconds, 3),
        "partitions": [
            {
                "partition": name,
                **member.budget(),
                "rounds_trained": member.rounds_trained,
                "refusals": member.refusals,
                "exhausted": member.exhausted,
            }
            for name, member in sorted(checkpoint.members.items())
        ],
    }
    replace(directory / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
    report.write(directory)
