"""Sequence parallelism: traffic, work and balance of several ranks."""
