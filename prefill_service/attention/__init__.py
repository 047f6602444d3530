"""Attention of one rank's queries: exact or sparse, verified, and what is reported of it."""
