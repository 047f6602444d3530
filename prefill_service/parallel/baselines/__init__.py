"""Approximate sequence parallelism as published, to compare with: Spava, Star Attention, APB."""
