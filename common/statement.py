"""A partition's signed statement: what its ledger says, as figures that anybody can compute again offline.

What is signed is the canonical JSON of the whole statement, with the EC key by which the partition proves who it is.
The server only passes it on: a statement that it changed does not verify.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config import Count, PartitionName, Positive

MAX_BYTES = 32 * 1024  # of one signed statement; an honest one has about 4 KB
RUN_NAME = r"[A-Za-z0-9._-]{1,64}"

# The same key signs Flower's calls: no signature over the one can be taken for one over the other.
_DOMAIN = b"fedeps privacy statement\n"

Text = Annotated[str, Field(max_length=400, pattern=r"^[\x20-\x7e]*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256
Number = Annotated[int, Field(ge=0, le=10**12)]


class StatementError(ValueError):
    """Not a signed statement that can be used. One line."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Run(_Part):
    """What the ledger charged for one run of a server, under the name that the server gave it."""

    name: Annotated[str, Field(pattern=f"^{RUN_NAME}$")]
    rounds_charged: Number
    rounds_committed: Number  # of these, ended in an update
    steps_charged: Number


class Mechanism(_Part):
    """The terms now in force: constants of the owner's policy."""

    name: Literal["DP-SGD"]  # Abadi et al. 2016, arXiv:1607.00133, Algorithm 1
    sampling: Literal["Poisson"]  # each record joins each batch independently
    noise: Literal["Gaussian"]
    noise_multiplier: Positive  # noise stddev / max_grad_norm
    max_grad_norm: Positive  # L2 bound on one record's gradient
    batch_size: Count  # expected records in a batch
    records_nominal: Count  # a public figure, never the count of the data
    sample_rate: Positive
    max_steps_per_round: Count


class Accounting(_Part):
    """How epsilon follows from the releases."""

    mode: Literal["fixed", "adaptive"]
    accountant: Text
    assumptions: Annotated[tuple[Text, ...], Field(max_length=20)]


class Steps(_Part):
    """All steps that were ever charged with one mechanism."""

    noise_multiplier: Positive
    sample_rate: Positive
    steps: Annotated[int, Field(ge=1, le=10**12)]


class LedgerHead(_Part):
    """The line of the ledger that the statement describes, and what lies before it."""

    id: Text
    sequence: Annotated[int, Field(ge=1, le=10**12)]
    hash: Digest
    time: Text  # of that line, by the client's clock
    charges: Number
    commits: Number


class Audit(_Part):
    """The last empirical audit of this client's training path."""

    ok: bool
    epsilon_lower_bound: Annotated[float, Field(ge=0)]
    time: Text


class Statement(_Part):
    """What one partition states. Everything in it is a constant of the policy or follows from the ledger."""

    version: Literal[1]
    partition: PartitionName
    task: Text
    run: Run | None
    unit: Literal["one record of the partition"]
    adjacency: Literal["add-or-remove-one"]
    epsilon_spent: Annotated[float, Field(ge=0)]  # of all charges, over all runs, at delta
    epsilon_budget: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]
    mechanism: Mechanism
    accounting: Accounting
    releases: Annotated[tuple[Steps, ...], Field(max_length=256)]
    ledger: LedgerHead
    update_sha256: Digest | None  # of the parameters in the reply that brought this statement
    audit: Audit | None
    software: Annotated[dict[Text, Text], Field(max_length=20)]
    not_covered: Annotated[tuple[Text, ...], Field(max_length=20)]
    public_key: Text  # in OpenSSH format; what makes it the partition's is the server's or the reader's own copy

    def canonical(self) -> bytes:
        """The bytes that are signed: keys sorted, no spaces, numbers as Python writes them."""
        content = self.model_dump(mode="json")
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """A statement and the signature over it, which `verify` has yet to check."""

    statement: Statement
    signature: str  # ECDSA with SHA-384, DER in base64

    @classmethod
    def by(cls, key: ec.EllipticCurvePrivateKey, statement: Statement) -> Self:
        signature = key.sign(_DOMAIN + statement.canonical(), ec.ECDSA(hashes.SHA384()))
        return cls(statement=statement, signature=base64.b64encode(signature).decode())

    @classmethod
    def parse(cls, content: Any) -> Self:
        """From what `content` gives, as JSON has it.

        Raises:
            StatementError: naming the first key that is missing, unknown, of another type or out of range.
        """
        if not isinstance(content, dict) or set(content) != {"statement", "signature"}:
            raise StatementError("expected a statement and its signature")
        if type(content["signature"]) is not str:
            raise StatementError("signature: expected text")
        try:  # as JSON, where a tuple is a list
            statement = Statement.model_validate_json(json.dumps(content["statement"], allow_nan=False))
        except ValidationError as error:
            finding = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in finding["loc"])
            raise StatementError(f"{key or 'statement'}: {finding['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise StatementError(f"statement: {error}") from None
        return cls(statement=statement, signature=content["signature"])

    @classmethod
    def loads(cls, text: str) -> Self:
        """From the text that `dumps` made. Raises StatementError."""
        if len(text) > MAX_BYTES:
            raise StatementError(f"expected at most {MAX_BYTES} characters, found {len(text)}")
        return cls.parse(loads(text))

    def content(self) -> dict[str, Any]:
        """What `parse` takes."""
        return {"statement": self.statement.model_dump(mode="json"), "signature": self.signature}

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(self.content(), separators=(",", ":"), allow_nan=False)

    def verify(self, key: ec.EllipticCurvePublicKey) -> None:
        """Raises StatementError unless `key` is the one that the statement names and that signed it."""
        if self.statement.public_key != public_text(key):
            raise StatementError("signed by another key than the partition's")
        try:
            signature = base64.b64decode(self.signature, validate=True)
            key.verify(signature, _DOMAIN + self.statement.canonical(), ec.ECDSA(hashes.SHA384()))
        except (InvalidSignature, binascii.Error, ValueError):
            raise StatementError("the signature does not fit: it was edited, or another key signed it") from None


def loads(text: str | bytes) -> Any:
    """JSON in which no key comes twice: a person would read the one value, a program the other.

    Raises:
        StatementError: not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise StatementError(f"not JSON: {error}") from None


def public_key(line: str | bytes) -> ec.EllipticCurvePublicKey:
    """An OpenSSH public key as the server has it. Raises StatementError."""
    try:
        key = serialization.load_ssh_public_key(line.encode() if isinstance(line, str) else line)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise StatementError(f"not an OpenSSH public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise StatementError("expected an EC key")
    return key


def public_text(key: ec.EllipticCurvePublicKey) -> str:
    """The key in OpenSSH format, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content
