"""The result of an audit, as `python -m audit` writes it and the client's exporter reads it.

It says which terms it is of: under other terms it says nothing.
"""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from common import files
from common.config import Privacy

FORMAT: Literal["fedeps-audit-1"] = "fedeps-audit-1"

Epsilon = Annotated[float, Field(ge=0)]


class AuditUnreadable(ValueError):
    """There is a file, and it is not the result of an audit. One line."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Check(_Part):
    """A value, and where it lies when the client does what is claimed."""

    name: str
    observed: float | None  # None: not a finite number
    low: float
    high: float
    ok: bool

    @classmethod
    def of(cls, *, name: str, observed: float, low: float, high: float) -> Self:
        value = observed if math.isfinite(observed) else None
        return cls(name=name, observed=value, low=low, high=high, ok=value is not None and low <= value <= high)


class Point(_Part):
    """Where a trial stood after some of its rounds."""

    rounds: int
    claimed: Epsilon  # by the client
    one_run: Epsilon  # lower bound that holds for any training
    privacy_loss: Epsilon  # lower bound that holds for the documented mechanism


class Setting(_Part):
    """One trial: the terms of its rounds, what was claimed and what was measured."""

    name: str
    noise_multiplier: float
    sample_rate: float
    steps: int  # of each round
    points: Annotated[list[Point], Field(min_length=1)]  # the last one is of the whole trial
    checks: Annotated[list[Check], Field(min_length=1)]


class Audit(_Part):
    """All trials of one audit. The first setting is the owner's terms."""

    format: Literal["fedeps-audit-1"] = FORMAT
    time: Annotated[AwareDatetime, Field(strict=False)]
    ok: bool
    short: bool
    confidence: float  # of the lower bound `one_run`
    false_alarm: float  # probability that a sound client fails, at most
    canaries: int
    seconds: float
    privacy: Privacy  # the terms that were audited
    settings: Annotated[list[Setting], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ok != all(check.ok for setting in self.settings for check in setting.checks):
            raise ValueError("ok does not follow from the checks")
        return self

    @property
    def epsilon_lower_bound(self) -> float:
        """Measured under the owner's terms, at `confidence`."""
        return self.settings[0].points[-1].one_run

    @property
    def epsilon_claimed(self) -> float:
        """By the client, for what was measured."""
        return self.settings[0].points[-1].claimed


def write(audit: Audit, path: Path) -> None:
    """Replaces the result at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, audit.model_dump_json(indent=2).encode() + b"\n")


def read(path: Path) -> Audit | None:
    """The result at `path`, None where no audit was made.

    Raises:
        AuditUnreadable: it is there and cannot be read, or is something else.
    """
    try:
        return Audit.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AuditUnreadable(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise AuditUnreadable(f"{path}: not the result of an audit: {where}: {first['msg']}") from None
