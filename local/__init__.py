"""The same federation as processes on this machine: what `make run` and `make forget` call."""
