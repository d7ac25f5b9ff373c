"""The data owner's side: policy, ledger, DP training, and the connection to the server."""
