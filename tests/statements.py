"""Signed statements for tests of the server, which believes none of their figures and computes none."""

from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from common.messages import Standing
from common.statement import Signed, Statement, public_text


def signed(
    key: ec.EllipticCurvePrivateKey, standing: Standing, *, run: str, update: str | None, **changes: Any
) -> Signed:
    """What a partition with this standing would state; `ledger__sequence=1` changes that field before it signs."""
    content: dict[str, Any] = {
        "version": 1,
        "partition": standing.partition,
        "task": "digits",
        "run": {"name": run, "rounds_charged": 1, "rounds_committed": 1, "steps_charged": 4},
        "unit": "one record of the partition",
        "adjacency": "add-or-remove-one",
        "epsilon_spent": standing.epsilon_spent,
        "epsilon_budget": standing.epsilon_budget,
        "delta": standing.delta,
        "mechanism": {
            "name": "DP-SGD", "sampling": "Poisson", "noise": "Gaussian", "noise_multiplier": 1.5, "max_grad_norm": 0.5,
            "batch_size": 64, "records_nominal": 718, "sample_rate": 64 / 718, "max_steps_per_round": 4,
        },
        "accounting": {"mode": "adaptive", "accountant": "RDP", "assumptions": ("Poisson sampling.",)},
        "releases": ({"noise_multiplier": 1.5, "sample_rate": 64 / 718, "steps": 4},),
        "ledger": {
            "id": "f00d", "sequence": standing.ledger_sequence, "hash": standing.ledger_head,
            "time": "2026-01-01T00:00:00.000Z", "charges": 1, "commits": 1,
        },
        "update_sha256": update,
        "audit": None,
        "software": {"fedeps": "1"},
        "not_covered": ("Side channels.",),
        "public_key": public_text(key.public_key()),
    }  # fmt: skip
    for name, value in changes.items():
        *way, last = name.split("__")
        place = content
        for step in way:
            place = place[step]
        place[last] = value
    return Signed.by(key, Statement.model_validate(content))
