"""An attack on this installation's own client: how much can be read from its updates, against what it claims.

`trial` runs the shipped client on `canaries`, `privacy_loss` and `one_run` read its updates as an adversary would,
`conformance` holds them against the documented mechanism, `report` puts it together. Nothing imports this package.
"""
