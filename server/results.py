"""What a run leaves behind when it ends: `model.safetensors`, `summary.json`, `privacy.json`, `report.html`."""

import json
from pathlib import Path

import safetensors.numpy

from common.config import Federation
from common.files import replace
from server import report, statements
from server.checkpoint import Checkpoint
from server.history import last_round


def write(directory: Path, config: Federation, checkpoint: Checkpoint, *, reason: str) -> None:
    """Write them into the run's directory; what an earlier end of the same run wrote is replaced."""
    model = safetensors.numpy.save(checkpoint.arrays)
    replace(directory / "model.safetensors", model)
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
    statements.write(directory, config, checkpoint, model=model)
    report.write(directory)
