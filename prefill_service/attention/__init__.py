"""Attention over keys on this rank: exact (dense) partial results and their merge."""
