"""The privacy budget of one partition: one append-only file, beside the data it protects.

`chain` is the file (hashes, lock, durability), `account` is what its entries add up to, `writer` charges it,
`siblings` are the owner's other ledgers, and `beginning` makes the first ones.
"""

from client.ledger.account import Account
from client.ledger.beginning import begin
from client.ledger.writer import (
    BudgetExhausted,
    DataOfAnother,
    DuplicateMessage,
    Head,
    Ledger,
    LedgerError,
    RolledBack,
    create,
    read,
)

__all__ = [
    "Account",
    "BudgetExhausted",
    "DataOfAnother",
    "DuplicateMessage",
    "Head",
    "Ledger",
    "LedgerError",
    "RolledBack",
    "begin",
    "create",
    "read",
]
