"""Sequence parallelism: who computes which tokens, and how keys and values travel."""
