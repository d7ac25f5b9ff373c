"""The server of a federation: SuperLink and its run, the rounds, what is kept of them, and `/metrics`."""
