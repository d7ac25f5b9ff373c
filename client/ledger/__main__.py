"""`python -m client.ledger show|verify|create|begin`: for people and scripts. Never writes to an existing ledger."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from client.ledger import Account, LedgerError, begin, create, read
from common.config import ConfigError, Policy, load


def describe(account: Account) -> dict[str, Any]:
    """What `show` prints."""
    return {
        "partition": account.partition,
        "ledger": account.ledger,
        "accounting": account.mode,
        "epsilon_spent": account.epsilon_spent,
        "epsilon_reserved": account.epsilon_reserved,
        "epsilon_budget": account.budget,
        "delta": account.delta,
        "reservations": len(account.messages),
        "commits": account.commits,
        "epoch": account.epoch,
        "sequence": account.sequence,
        "head": account.head,
        "last_write": account.last_time,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m client.ledger", description="Reads or creates a privacy ledger.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("show", "print what was spent"), ("verify", "check every line"), ("create", "start a budget")):
        command = verbs.add_parser(verb, help=text)
        command.add_argument("path", type=Path)
        command.add_argument("--json", action="store_true", help="print JSON")
        if verb == "create":
            command.add_argument("--policy", type=Path, required=True, help="the owner's policy.yaml")
            command.add_argument("--partition", required=True, help="the partition's name in the policy")
    command = verbs.add_parser("begin", help="start the budgets of all partitions, before they get their keys")
    command.add_argument("--policy", type=Path, required=True, help="the owner's policy.yaml")
    options = parser.parse_args(arguments)
    if options.verb == "begin":
        return _begin(options.policy)
    try:
        if options.verb == "create":
            policy = load(Policy, options.policy)
            if options.partition not in [partition.name for partition in policy.partitions]:
                raise ConfigError(
                    f"{options.policy}: partitions: no {options.partition!r} there (add it, or correct --partition)"
                )
            create(
                options.path,
                partition=options.partition,
                privacy=policy.privacy,
                anchor=policy.anchor_path(options.partition),
            )
        facts = describe(read(options.path))
    except (LedgerError, ConfigError) as error:
        print(
            json.dumps({"ok": False, "error": str(error)}) if options.json else error,
            file=sys.stdout if options.json else sys.stderr,
        )
        return 1
    if options.json:
        print(json.dumps({"ok": True, **facts}))
    elif options.verb == "verify":
        print(f"{options.path}: ok, {facts['sequence']} lines, head {facts['head']}")
    else:
        spent, budget, delta = (facts[name] for name in ("epsilon_spent", "epsilon_budget", "delta"))
        print(f"{facts['partition']} has spent epsilon {spent:.4f} of {budget:g} at delta {delta:g}")
        for name, value in facts.items():
            print(f"  {name:<17}{value}")
    return 0


def _begin(path: Path) -> int:
    try:
        made = begin(load(Policy, path))
    except (LedgerError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"made {ledger}" for ledger in made) or "nothing to make: every partition has its ledger")
    return 0


if __name__ == "__main__":
    sys.exit(main())
