"""Measurements that anybody can repeat: each module here is a command and a table."""
