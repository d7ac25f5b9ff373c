"""What a partition states about its ledger, and how anybody checks such a statement.

`making` writes and signs it, `checking` verifies it, `python -m client.statement` does both for people.
"""
