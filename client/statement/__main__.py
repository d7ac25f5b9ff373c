"""`python -m client.statement make|verify`: what a partition has spent, signed; and whether such a statement holds.

`verify` works offline and believes nobody: it needs the file, and proves more with the partitions' public keys and
with a ledger beside it.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from client.ledger import LedgerError, read
from client.statement.checking import check_arithmetic, check_ledger, check_signature, document
from client.statement.making import Signer
from common import statement as common
from common.certificates import fingerprint_of
from common.config import ConfigError, Policy, load
from common.statement import Signed, StatementError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m client.statement", description="Signed words about a ledger.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="state and sign what the ledgers of a policy say, without a server")
    make.add_argument("--policy", type=Path, default=Path("config/policy.yaml"), help="default: %(default)s")
    make.add_argument("--partition", help="one of the policy's partitions; default: all")
    make.add_argument("--run", default="", help="a run, by the server's name for it, whose charges are counted")
    verify = verbs.add_parser("verify", help="check signatures, arithmetic and ledgers, offline")
    verify.add_argument("file", type=Path, help="runs/<id>/privacy.json, or what `make` printed")
    verify.add_argument("--ledger", type=Path, help="a ledger, or a folder with <partition>/ledger.jsonl")
    verify.add_argument("--public-keys", type=Path, help="a folder with <partition>.pub, as the server has it")
    options = parser.parse_args(arguments)
    try:
        return _make(options) if options.verb == "make" else _verify(options)
    except (StatementError, LedgerError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2


def _make(options: argparse.Namespace) -> int:
    policy = load(Policy, options.policy)
    names = [partition.name for partition in policy.partitions]
    if options.partition and options.partition not in names:
        raise ConfigError(f"{options.policy}: partitions: no {options.partition!r} there (correct --partition)")
    statements = []
    for name in [options.partition] if options.partition else names:
        account = read(policy.ledger_path(name))
        if account.partition != name:
            raise StatementError(f"{policy.ledger_path(name)}: the ledger of {account.partition}, not of {name}")
        statements.append(Signer(policy, name).sign(account, run=options.run).content())
    print(json.dumps({"statements": statements}, indent=2))
    return 0


def _verify(options: argparse.Namespace) -> int:
    try:
        around, found = document(options.file.read_text(encoding="utf-8"))
        ledgers = _ledgers(options.ledger) if options.ledger else {}
    except (OSError, UnicodeError, StatementError) as error:
        print(f"{options.file}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    failures, seen = 0, set()
    for number, content in enumerate(found, start=1):
        name = f"statement {number}"
        try:
            signed = Signed.parse(content)
            name = signed.statement.partition
            if name in seen:
                raise StatementError("stated twice in this file")
            seen.add(name)
            check_signature(signed, options.public_keys)
            if path := ledgers.get(name):
                check_ledger(signed.statement, path)
            elif options.ledger and options.ledger.is_dir():
                raise StatementError(f"ledger: no {options.ledger}/{name}/ledger.jsonl to compare with")
            check_arithmetic(signed.statement, budget_kept=path is not None)
            _check_around(around, signed)
            print(f"{name}: holds: {_summary(signed)}; {_proven(path, options.public_keys, signed)}")
        except StatementError as error:
            failures += 1
            print(f"{name}: DOES NOT HOLD: {error}")
    for name in sorted(ledgers.keys() - seen):
        if not options.ledger.is_dir():
            failures += 1
            print(f"{name}: DOES NOT HOLD: there is its ledger, and no statement of it")
    failures += _check_model(options.file, around)
    return 1 if failures else 0


def _ledgers(path: Path) -> dict[str, Path]:
    """Each ledger by its partition."""
    if path.is_dir():
        return {file.parent.name: file for file in sorted(path.glob("*/ledger.jsonl"))}
    try:
        return {read(path).partition: path}
    except LedgerError as error:
        raise StatementError(f"--ledger: {error}") from None


def _check_around(around: dict[str, Any], signed: Signed) -> None:
    """What the server wrote around the statements must be what they say themselves."""
    run = signed.statement.run.name if signed.statement.run else None
    for key, stated in (("run", run), ("task", signed.statement.task)):
        if key in around and stated is not None and around[key] != stated:
            raise StatementError(f"{key}: the file says {around[key]!r}, the statement {stated!r}")


def _check_model(file: Path, around: dict[str, Any]) -> int:
    """The model beside the file is the one that the server names. It is the server's word: nobody signed it."""
    model = file.parent / "model.safetensors"
    if "model_sha256" not in around or not model.exists():
        return 0
    if hashlib.sha256(model.read_bytes()).hexdigest() == around["model_sha256"]:
        return 0
    print(f"{model}: DOES NOT HOLD: its SHA-256 is not the file's model_sha256")
    return 1


def _summary(signed: Signed) -> str:
    statement = signed.statement
    run = f", {statement.run.rounds_charged} rounds in run {statement.run.name}" if statement.run else ""
    return (
        f"epsilon {statement.epsilon_spent:.4f} of {statement.epsilon_budget:g} at delta {statement.delta:g}"
        f" ({statement.accounting.mode}), ledger line {statement.ledger.sequence}{run}"
    )


def _proven(ledger: Path | None, keys: Path | None, signed: Signed) -> str:
    key = fingerprint_of(common.public_key(signed.statement.public_key))
    return (
        f"signature and arithmetic checked, key {key} {'as registered' if keys else 'not compared (--public-keys)'},"
        f" {'the ledger agrees' if ledger else 'ledger not compared (--ledger)'}"
    )


if __name__ == "__main__":
    sys.exit(main())
