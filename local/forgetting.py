"""`forget`: removes the demo's state, budgets included, once its owner has said so. Reports in `runs/` stay."""

import shutil
import sys
from pathlib import Path

from local.errors import LocalError

_WORD = "forget"


def forget(state: Path, lock: Path, *, agreed: bool) -> None:
    """Ask, then remove everything in `state`; its caller holds `lock`, which goes last.

    Raises:
        LocalError: there is nobody to ask.
    """
    print(f"This removes {state}/: keys, certificates, and the only record of what was spent:")
    for line in _ledgers(state) or ["no ledger"]:
        print(f"  {line}")
    if not agreed and not _agreed():
        print("Nothing was removed.")
        return
    for path in sorted(state.iterdir(), key=_order):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != lock:
            path.unlink()
    lock.unlink()
    print(f"{state}/ is empty. The next `make run` starts with new budgets.")


def _order(path: Path) -> tuple[bool, str]:
    """Ledgers last: whatever interrupts the removal, no key is left whose ledger is gone."""
    return path.name == "clients", path.name


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise LocalError("forget: nobody can be asked without a terminal (python -m local forget --yes does not ask)")
    try:
        return input(f"Type {_WORD} to go on: ").strip() == _WORD
    except EOFError:
        return False


def _ledgers(state: Path) -> list[str]:
    paths = sorted(state.glob("clients/*/ledger.jsonl"))
    if not paths:
        return []
    from client import ledger  # it imports scipy: not for a state without ledgers

    lines = []
    for path in paths:
        try:
            account = ledger.read(path)
        except ledger.LedgerError as error:
            lines.append(str(error))
        else:
            spent = f"{account.epsilon_spent:.3f} of epsilon {account.budget:g} at delta {account.delta:g}"
            lines.append(f"{account.partition}: {spent}")
    return lines
